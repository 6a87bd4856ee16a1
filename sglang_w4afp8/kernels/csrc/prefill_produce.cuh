// Who fills the ring of the prefill path's matrix kernels: warps that copy weights, scales and
// tokens to its stages (prefill_ring.cuh), item after item.
#pragma once
#include "prefill_ring.cuh"

struct Weights {
  const u8* w;       // (E, rows, K / 2) in stage order
  const u8* scales;  // (E, rows, K / group) bfloat16 in stage order
  int rows, k;
};

constexpr u32 kNoRow = 0xffffffffu;

// One warp: weights and scales, by one lane each for every block of the layout. Of the CTAs of a
// cluster each waits for all bytes, and copies half of them. A copy may come before the other CTA
// expects its bytes, but not a phase early: that CTA's consumers have released the stage, so they
// had what was in it before.
__device__ __forceinline__ void produce_weights(const Weights& p, const Queue& queue,
                                                const Ring& ring) {
  const int lane = threadIdx.x & 31, tiles = p.rows / 64, stages = p.k / kSpan;
  constexpr int kBlockTiles = 2 * kLayoutTiles;  // of the layout
  constexpr int kTogether = kBlockTiles < kRowTiles ? kBlockTiles : kRowTiles;
  constexpr int kCopies = kRowTiles / kTogether;
  const bool mine = kCluster == 1 || (lane & 1) == (blockIdx.x & 1);
  static_assert(kCluster == 1 || kCopies == 2, "one copy of codes and one of scales for each CTA");
  const bool is_scale = lane >= kCopies;
  const int first = (is_scale ? lane - kCopies : lane) * kTogether;
  const u64 row_bytes = is_scale ? p.k / kGroup * 2 : p.k / 2;
  const u32 tile_bytes = is_scale ? kTileScaleBytes : kTileBytes;
  const u32 to = is_scale ? kScalesAt + first * kTileScaleBytes : kWeightsAt + first * kTileBytes;
  Reader reader;
  Place place;
  for (;;) {
    const Item item = reader.next(queue, ring);
    if (item.kind == kEnd) return;
    const int row_tiles = min(kRowTiles, tiles - item.block * kRowTiles);
    const int tile = item.block * kRowTiles + first;
    const int block = tile / kBlockTiles, beside = min(kBlockTiles, tiles - block * kBlockTiles);
    const int count = lane < 2 * kCopies && mine ? min(kTogether, row_tiles - first) : 0;
    const u8* from = (is_scale ? p.scales : p.w) + item.expert * (p.rows * row_bytes) +
                     static_cast<u64>(block) * kBlockTiles * 64 * row_bytes +
                     tile % kBlockTiles * tile_bytes;
    for (int step = 0; step < stages; ++step) {
      const u32 full = ring.weights_full(place.slot);
      barrier_wait(ring.empty(place.slot), place.phase ^ 1);
      if (lane == 0) barrier_expect(full, row_tiles * (kTileBytes + kTileScaleBytes));
      __syncwarp();
      if (count > 0) {
        const u32 there = ring.stage(place.slot) + to;
        if constexpr (kCluster == 2) {
          bulk_copy_to_all(there, from, count * tile_bytes, full, kCluster);
        } else {
          bulk_copy(there, from, count * tile_bytes, full);
        }
      }
      from += beside * tile_bytes;
      place.advance(ring.size);
    }
  }
}

// What is copied to every stage of an item.
struct Copy {
  const u8* from;
  u32 to, bytes;  // 0 bytes: nothing
};

// Tokens that others copy (produce_tokens).
struct NoRows {
  static constexpr int kCopies = 0, kReads = 1;
  __device__ __forceinline__ void wait(const Item&) const {}
  __device__ __forceinline__ u32 bytes(const Item&) const { return 0; }
  __device__ __forceinline__ Copy copy(const Item&, int) const { return Copy{nullptr, 0, 0}; }
  __device__ __forceinline__ u32 next(int) const { return 0; }
};

// One warp: what produce_weights does where each warpgroup has one row tile, and tokens, if `rows`
// copies any; then one barrier is for all of a stage. One lane has all copies: with a lane for
// each, the compiler's loop over lanes takes about as long as those who multiply.
template <class Rows>
__device__ __forceinline__ void produce_stages(const Weights& p, const Queue& queue,
                                               const Ring& ring, Rows rows) {
  const int tiles = p.rows / 64, stages = p.k / kStageK;
  constexpr int kBlockTiles = 2 * kLayoutTiles;
  constexpr bool kWithTokens = Rows::kCopies > 0;
  const bool mine = chosen();
  Reader reader;
  Place place;
  auto full = [&] {
    return kWithTokens ? ring.tokens_full(place.slot, 0) : ring.weights_full(place.slot);
  };
  for (;;) {
    Item item = reader.next(queue, ring, Rows::kReads);
    if (uniform(item.kind) == kEnd) return;
    item.expert = uniform(item.expert), item.first = uniform(item.first);
    item.count = uniform(item.count), item.block = uniform(item.block);
    rows.wait(item);
    const int row_tiles = min(kRowTiles, tiles - item.block * kRowTiles);
    const u8 *codes[kRowTiles], *scales[kRowTiles];
    u32 beside[kRowTiles];  // row tiles of the layout's block
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t) {
      const int tile = item.block * kRowTiles + t, block = tile / kBlockTiles;
      beside[t] = min(kBlockTiles, tiles - block * kBlockTiles);
      const u64 before = item.expert * static_cast<u64>(p.rows) + block * (kBlockTiles * 64);
      codes[t] = p.w + before * (p.k / 2) + tile % kBlockTiles * (kCuts * kTileBytes);
      scales[t] = p.scales + before * (p.k / kGroup * 2) +
                  tile % kBlockTiles * (kCuts * kTileScaleBytes);
    }
    Copy tokens[kWithTokens ? Rows::kCopies : 1];
#pragma unroll
    for (int i = 0; i < Rows::kCopies; ++i) tokens[i] = rows.copy(item, i);
    const u32 bytes = row_tiles * (kTileBytes + kTileScaleBytes) + rows.bytes(item);
    for (int step = 0; step < stages; ++step) {
      barrier_wait(ring.empty(place.slot), place.phase ^ 1);
      if (mine) {
        const u32 stage = ring.stage(place.slot);
        if constexpr (kWithTokens) {
          barrier_expect_all(full(), bytes, kTokenArrivals);
        } else {
          barrier_expect(full(), bytes);
        }
#pragma unroll
        for (int t = 0; t < kRowTiles; ++t) {
          if (t >= row_tiles) break;
          bulk_copy(stage + kWeightsAt + t * kTileBytes, codes[t], kTileBytes, full());
          bulk_copy(stage + kScalesAt + t * kTileScaleBytes, scales[t], kTileScaleBytes, full());
        }
#pragma unroll
        for (int i = 0; i < Rows::kCopies; ++i) {
          if (tokens[i].bytes > 0) {
            bulk_copy(stage + tokens[i].to, tokens[i].from, tokens[i].bytes, full());
          }
        }
      }
      __syncwarp();  // a lane that fell a round behind could not tell the phases apart
      const bool last_cut = step % kCuts == kCuts - 1;
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t) {
        const u32 next = last_cut ? beside[t] * kCuts - kCuts + 1 : 1;
        codes[t] += next * kTileBytes, scales[t] += next * kTileScaleBytes;
      }
#pragma unroll
      for (int i = 0; i < Rows::kCopies; ++i) tokens[i].from += rows.next(i);
      place.advance(ring.size);
    }
  }
}

// Tokens that have one scale for all columns, or all the same.
struct NoScales {
  __device__ __forceinline__ void find(const int*, int) {}
  __device__ __forceinline__ void copy(u32, int) const {}
};

// Two warps, `part` 0 and 1: the rows of the item's tokens. `row(pair)` is the number of the row of
// `b` (k bytes) that a pair reads. A lane's copies arrive at the barrier when they are there, so
// nobody waits for them here.
template <class Row, class Scales = NoScales>
__device__ __forceinline__ void produce_tokens(const u8* b, int k, const int* columns,
                                               int list_stride, const Queue& queue,
                                               const Ring& ring, int part, Row row,
                                               Scales scales = {}) {
  const int lane = threadIdx.x & 31, stages = k / kStageK;
  constexpr int kMine = kTokens / 2 / kRowsAtOnce;
  const int piece = lane % kPieces, first = part * kRowsAtOnce + lane / kPieces;
  const int swizzled = piece ^ (kPanel == 128 ? first % 8 : first / 2 % 4);
  const u32 to_lane = first * kPanel + swizzled * 16;
  Reader reader;
  Place place;
  for (;;) {
    const Item item = reader.next(queue, ring);
    if (item.kind == kEnd) return;
    u32 from[kMine];  // where rows begin, in units of 16 bytes: one multiplication gives an address
    const int* list = columns + static_cast<u64>(item.list) * list_stride + item.first;
#pragma unroll
    for (int j = 0; j < kMine; ++j) {
      const int c = j * 2 * kRowsAtOnce + first;
      from[j] = c < item.count ? row(list[c]) * (k / 16) : kNoRow;
    }
    scales.find(list, item.count);
    const u8* at = b + piece * 16;
    for (int step = 0; step < stages; ++step) {
      barrier_wait(ring.empty(place.slot), place.phase ^ 1);
      u32 to = ring.stage(place.slot) + to_lane;
      scales.copy(ring.stage(place.slot) + kColumnScalesAt, step);
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
#pragma unroll
        for (int panel = 0; panel < kK / kPanel; ++panel) {
#pragma unroll
          for (int j = 0; j < kMine; ++j) {
            if (from[j] != kNoRow) {
              async_copy16(to + j * 2 * kRowsAtOnce * kPanel, at + static_cast<u64>(from[j]) * 16);
            }
          }
          to += kTokens * kPanel, at += kPanel;
        }
        async_copy_arrive(ring.tokens_full(place.slot, h));
      }
      place.advance(ring.size);
    }
  }
}
