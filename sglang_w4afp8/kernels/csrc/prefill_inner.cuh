// Of prefill_up.cu with per-token scales: what a tile's columns are scaled by; its rows of products
// to FP8, by their own amax, when all of them are there. The warp that claims items does what waits
// for memory: those that multiply have no fence and no barrier of their own for it.
#pragma once
#include "prefill.cuh"
#include "units.cuh"

#ifndef W4_INNER
#define W4_INNER 0
#endif
constexpr int kInner = W4_INNER;  // columns of `inner`; 0 where scales are static
static_assert((kInner > 0) == (W4_DYNAMIC != 0), "");

// What the warp that claims knows of an item before its products are there. Of the columns behind
// the last one the pair is -1.
struct __align__(8) Column {
  int pair;
  float scale;  // of its token, times what codes are decoded to
};
// A tile whose products are all there: its rows are quantised before the item that comes with it.
struct Complete {
  u64 first_column;
  int count;  // 0: none
};
constexpr int kSlots = kInner > 0 ? kQueue : 1;
__shared__ __align__(16) Column columns[kSlots][kInner > 0 ? kTokens : 2];
__shared__ Complete complete[kSlots];
__shared__ u64 columns_bars[kSlots];

// One thread, before make_ring().
__device__ __forceinline__ void make_columns() {
  for (int i = 0; i < kSlots; ++i) barrier_init(smem_address(columns_bars + i), kLanes);
}
// Those of item `number`, when they are there.
__device__ __forceinline__ const Column* wait_columns(int number) {
  const int slot = number % kQueue;
  barrier_wait(smem_address(columns_bars + slot), (number / kQueue) & 1);
  return columns[slot];
}

// One lane, when all readers are through with `item`, one of `blocks` of its tile or half of one:
// the products are in memory, for them and, after the fence, for everybody. The count is zero again
// when all columns of all blocks are there.
template <class Params>
__device__ __forceinline__ Complete count_columns(const Params& p, const Item& item, u32 blocks) {
  if (item.count == 0) return Complete{};
  const Tile tile = p.tiles[item.tile];
  u32* count = p.tile_count + item.tile;
  const u32 here = item.count;
  __threadfence();
  if (atomicAdd(count, here) + here != blocks * tile.count) return Complete{};
  *count = 0;
  __threadfence();
  return Complete{static_cast<u64>(item.list) * p.list_pairs + tile.first, tile.count};
}

// Whether a tile's rows take so long that its CTA has no other item while it quantises them. Else
// the next item's stages are on their way, and it would be idle until they come.
constexpr bool kApart = kInner > 512;

// claim() for a whole warp, which also fetches what columns are scaled by, and counts columns. It
// learns that an item is done with when it wants the slot, so rests for the other slots lie between
// the last item and the end. `ready(item)`: waits for the scales of an item's tokens.
template <class Params, class Describe, class Ready>
__device__ __forceinline__ void claim_and_count(const Params& p, Queue& queue, const Ring& ring,
                                                u32 blocks, Describe describe, Ready ready) {
  const int lane = threadIdx.x & 31;
  for (int i = 0, claimed = 0, rests = 0;; ++i) {
    const int slot = i % kQueue;
    const u32 bar = ring.queue_bars + slot * 16;
    barrier_wait(bar + 8, ((i / kQueue) & 1) ^ 1);
    __syncwarp();  // a lane that fell a round behind could not tell the phases apart
    Item& item = queue.item[slot];
    if (lane == 0) {
      const Complete tile = i < kQueue ? Complete{} : count_columns(p, item, blocks);
      Item next{};
      if (kApart && tile.count > 0) {
        next.kind = kRest;
      } else if (rests == 0) {
        next = describe(claim_number(p.claimed, claimed++));
      }
      if (next.kind == kEnd && ++rests < kQueue) next.kind = kRest;
      complete[slot] = tile, item = next;
      barrier_arrive(bar);
    }
    __syncwarp();
    if (item.kind == kEnd) return;
    if (item.kind == kMatrix) {
      ready(item);
      const int* pairs = p.columns + static_cast<u64>(item.list) * p.list_pairs + item.first;
#pragma unroll
      for (int c = lane; c < kTokens; c += 32) {
        const int pair = c < item.count ? pairs[c] : -1;
        const float scale = kRowScales ? 1.0f : pair < 0 ? 0.0f : __ldcg(p.b_scale + pair / p.top_k);
        columns[slot][c] = Column{pair, scale * 512.0f};
      }
      __syncwarp();
    }
    if (kEveryLane || lane == 0) barrier_arrive(smem_address(columns_bars + slot));
  }
}

// Rows that a warp has in registers at once, 128 numbers of each lane in all, or 64: memory is far
// away, and whoever has the last part of a tile is waited for. With short groups two row tiles leave
// the loops over K no registers for more.
constexpr int kVectors = kInner > 0 ? (kInner + 127) / 128 : 1;  // float4 of a lane and row
constexpr int kHeld = kGroup < 128 && kPerWg == 2 ? 16 : 32;
constexpr int kRowsHeld = kVectors < 2 ? kHeld / 2 : kHeld / kVectors;  // 0: a row is too wide

// All warpgroups of a CTA: rows of the `count` pairs of a tile, `row_of(c)` for `store(row, i,
// four)` and the codes of columns i .. i + 3.
template <int kRows, class Params, class Rows, class Store>
__device__ __forceinline__ void quantize_tile(const Params& p, const int* pairs, int count,
                                              Rows row_of, Store store) {
  constexpr int kWarps = kConsumers / 32;
  // Uniform, or the compiler takes branches for such that part a warp, and the loops over K spill.
  const int thread = read_thread(), warp = uniform(thread >> 5), lane = thread & 31;
  if constexpr (kRows == 0) {
    for (int c = warp; c < count; c += kWarps) {
      const int pair = pairs[c], row = row_of(c);
      const float scale = quantize_row(p.inner + static_cast<u64>(pair) * kInner, kInner,
                                       [&](int i, u32 four) { store(row, i, four); });
      if (lane == 0) p.q_row_scale[pair] = scale;
    }
  } else {
    const int each = min(kRows, (count + kWarps - 1) / kWarps);  // of a warp at once
    for (int begin = warp * each; begin < count; begin += kWarps * each) {
      const int rows = min(each, count - begin);
      int pair_of = 0, row_here = 0;
      if (lane < rows) pair_of = pairs[begin + lane], row_here = row_of(begin + lane);
      float4 v[kRows][kVectors];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int pair = __shfl_sync(0xffffffffu, pair_of, r);
        const float* from = p.inner + static_cast<u64>(pair) * kInner;
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
          const int column = i * 128 + lane * 4;
          v[r][i] = r < rows && column < kInner
                        ? __ldcg(reinterpret_cast<const float4*>(from + column))
                        : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r >= rows) break;
        float amax = 0.0f;
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
          const float4 w = v[r][i];
          amax = fmaxf(amax, fmaxf(fmaxf(fabsf(w.x), fabsf(w.y)), fmaxf(fabsf(w.z), fabsf(w.w))));
        }
        for (int d = 16; d; d >>= 1) amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, d));
        const float scale = row_scale(amax);
        const Divisor by = Divisor::of(scale);
        const int row = __shfl_sync(0xffffffffu, row_here, r);
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
          const int column = i * 128 + lane * 4;
          const float4 w = v[r][i];
          if (column < kInner) {
            store(row, column, pack_e4m3(divide(w.x, by), divide(w.y, by)) |
                                   pack_e4m3(divide(w.z, by), divide(w.w, by)) << 16);
          }
        }
        const int pair = __shfl_sync(0xffffffffu, pair_of, r);
        if (lane == 0) p.q_row_scale[pair] = scale;
      }
    }
  }
}
