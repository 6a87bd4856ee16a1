// What the two matrix kernels of the prefill path share: producers of the ring, the loop over K.
//
// A work item is a tile of at most 128 tokens of one expert times 128 or 256 rows of weights for two
// consumer warpgroups, 192 for three, each with W4_PER_WG row tiles of 64 rows; all see the same
// tokens. The number of columns is chosen per item, in steps of 16: a tile computes no more than
// its tokens need. Items are claimed from a counter in their order, so that an item may wait for
// earlier ones without all CTAs being resident; results do not depend on who claims what.
#pragma once
#include "mma_wide.cuh"
#include "prefill_lists.cuh"
#include "prefill_ring.cuh"

struct Weights {
  const u8* w;       // (E, rows, K / 2) in stage order
  const u8* scales;  // (E, rows, K / group) bfloat16 in stage order
  int rows, k;
};

constexpr u32 kNoRow = 0xffffffffu;

// ---- producers -----------------------------------------------------------------------------------
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
    if (item.kind != kMatrix) continue;
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

// The same with a row tile for each warpgroup: a lane has the codes of one, or its scales.
__device__ __forceinline__ void produce_tiles(const Weights& p, const Queue& queue,
                                              const Ring& ring) {
  const int lane = threadIdx.x & 31, tiles = p.rows / 64, stages = p.k / kSpan;
  constexpr int kBlockTiles = 2 * kLayoutTiles;
  const bool is_scale = lane >= kRowTiles;
  const int mine = is_scale ? lane - kRowTiles : lane;
  const u64 row_bytes = is_scale ? p.k / kGroup * 2 : p.k / 2;
  const u32 bytes = is_scale ? kTileScaleBytes : kTileBytes;
  const u32 to = is_scale ? kScalesAt + mine * kTileScaleBytes : kWeightsAt + mine * kTileBytes;
  Reader reader;
  Place place;
  for (;;) {
    const Item item = reader.next(queue, ring);
    if (item.kind == kEnd) return;
    if (item.kind != kMatrix) continue;
    const int row_tiles = min(kRowTiles, tiles - item.block * kRowTiles);
    const int tile = item.block * kRowTiles + mine;
    const int block = tile / kBlockTiles, beside = min(kBlockTiles, tiles - block * kBlockTiles);
    const bool here = lane < 2 * kRowTiles && mine < row_tiles;
    const u8* from = (is_scale ? p.scales : p.w) + item.expert * (p.rows * row_bytes) +
                     static_cast<u64>(block) * kBlockTiles * 64 * row_bytes +
                     tile % kBlockTiles * (kCuts * bytes);
    for (int step = 0; step < stages; ++step) {
#pragma unroll
      for (int cut = 0; cut < kCuts; ++cut) {
        const u32 full = ring.weights_full(place.slot);
        barrier_wait(ring.empty(place.slot), place.phase ^ 1);
        if (lane == 0) barrier_expect(full, row_tiles * (kTileBytes + kTileScaleBytes));
        __syncwarp();
        if (here) bulk_copy(ring.stage(place.slot) + to, from + cut * bytes, bytes, full);
        place.advance(ring.size);
      }
      from += beside * (kCuts * bytes);
    }
  }
}

// Two warps, `part` 0 and 1: the rows of the item's tokens. `row(pair)` is the number of the row of
// `b` (k bytes) that a pair reads. A lane's copies arrive at the barrier when they are there, so
// nobody waits for them here.
template <class Row>
__device__ __forceinline__ void produce_tokens(const u8* b, int k, const int* columns,
                                               int list_stride, const Queue& queue,
                                               const Ring& ring, int part, Row row) {
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
    if (item.kind != kMatrix) continue;
    u32 from[kMine];  // where rows begin, in units of 16 bytes: one multiplication gives an address
    const int* list = columns + static_cast<u64>(item.list) * list_stride + item.first;
#pragma unroll
    for (int j = 0; j < kMine; ++j) {
      const int c = j * 2 * kRowsAtOnce + first;
      from[j] = c < item.count ? row(list[c]) * (k / 16) : kNoRow;
    }
    const u8* at = b + piece * 16;
    for (int step = 0; step < stages; ++step) {
      barrier_wait(ring.empty(place.slot), place.phase ^ 1);
      u32 to = ring.stage(place.slot) + to_lane;
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

// One warp: the rows of the item's tokens where they are in the order of the list, swizzled from a
// row that is a multiple of 8 rows after the expert's first. b: (rows / kBlockRows, k / kPanel,
// kBlockRows, kPanel).
__device__ __forceinline__ void produce_rows(const u8* b, int k, const Queue& queue,
                                             const Ring& ring) {
  const int lane = threadIdx.x & 31, stages = k / kStageK;
  constexpr int kPanels = kStageK / kPanel;
  constexpr int kPieces = kTokens / kBlockRows + 1;  // of a panel of the item
  const int panel = lane / kPieces, piece = lane % kPieces;
  constexpr u32 kStepBytes = kBlockRows * (kPanels * kPanel);
  Reader reader;
  Place place;
  for (;;) {
    const Item item = reader.next(queue, ring);
    if (item.kind == kEnd) return;
    if (item.kind != kMatrix) continue;
    const int block = item.first / kBlockRows + piece;
    const int begin = max(item.first, block * kBlockRows);
    const int end = min(item.first + item.count, (block + 1) * kBlockRows);
    const u64 line = static_cast<u64>(block * (k / kPanel) + panel - block) * kBlockRows;
    const u8* from = b + (line + begin) * kPanel;
    const u32 to = (panel * kTokens + begin - item.first) * kPanel;
    const bool mine = panel < kPanels && end > begin;
    for (int step = 0; step < stages; ++step) {
      const u32 full = ring.tokens_full(place.slot, 0);
      barrier_wait(ring.empty(place.slot), place.phase ^ 1);
      if (lane == 0) barrier_expect_all(full, item.count * kStageK, kTokenArrivals);
      __syncwarp();
      if (mine) bulk_copy(ring.stage(place.slot) + to, from, (end - begin) * kPanel, full);
      from += kStepBytes;
      place.advance(ring.size);
    }
  }
}

// The same value in all lanes, known to the compiler as such: what branches on it keeps addresses
// and descriptors in uniform registers.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

// ---- the loop over K -----------------------------------------------------------------------------
// This thread's codes of one scale group as wgmma wants them, and its two row scales.
struct Fragment {
  u32 a[kSteps * 4];
  u32 scales;
};

// `group`: of the stage.
__device__ __forceinline__ void load_fragment(Fragment& f, u32 w, u32 s, int tile, int group) {
  f.scales = lds32(s + tile * kTileScaleBytes + group * 128);
  w += tile * kTileBytes;
  if constexpr (kGroup >= 64) {
#pragma unroll
    for (int h = 0; h < kGroup / 64; ++h) {
      const uint4 v = lds128(w + (group * (kGroup / 64) + h) * 2048);
      decode_int4<kMinusEight>(v.x, f.a[8 * h + 0], f.a[8 * h + 1]);
      decode_int4<kMinusEight>(v.y, f.a[8 * h + 2], f.a[8 * h + 3]);
      decode_int4<kMinusEight>(v.z, f.a[8 * h + 4], f.a[8 * h + 5]);
      decode_int4<kMinusEight>(v.w, f.a[8 * h + 6], f.a[8 * h + 7]);
    }
  } else {
    const uint2 v = lds64(w + (group >> 1) * 2048 + (group & 1) * 8);
    decode_int4<kMinusEight>(v.x, f.a[0], f.a[1]);
    decode_int4<kMinusEight>(v.y, f.a[2], f.a[3]);
  }
}

// Descriptor of a panel: swizzled rows, 8 of them every 8 * kPanel bytes.
__device__ __forceinline__ u64 panel_descriptor(u32 address) {
  constexpr u64 kSwizzle = kPanel == 128 ? 1 : 2;
  return static_cast<u64>((address & 0x3ffffu) >> 4) | (1ull << 16) |
         (static_cast<u64>(8 * kPanel >> 4) << 32) | (kSwizzle << 62);
}
// How much further in a half the j-th 32 columns are, in a descriptor's units of 16 bytes.
__device__ __forceinline__ constexpr u64 column_step(int j) {
  return (j * 32 / kPanel * (kTokens * kPanel) + j * 32 % kPanel) / 16;
}

// Some columns' products of a fragment and a panel, before they are scaled.
template <int kColumns>
__device__ __forceinline__ void issue(float (&part)[kColumns / 2], const Fragment& f, u64 b,
                                      int group) {
  pin(part);
  mma_fence();
#pragma unroll
  for (int j = 0; j < kSteps; ++j) {
    Mma<kColumns>::issue(part, f.a[4 * j], f.a[4 * j + 1], f.a[4 * j + 2], f.a[4 * j + 3],
                         b + column_step(group * kSteps + j), j);
  }
  mma_commit();
}
// Adds them, times the scales of the fragment's rows, from accumulator kAt on.
template <int kAt, int kAll, int kCount>
__device__ __forceinline__ void add(float (&acc)[kAll], float (&part)[kCount], u32 scales) {
  const float s0 = bf16_low(scales), s1 = bf16_high(scales);
#pragma unroll
  for (int c = 0; c < kCount; c += 4) {
    acc[kAt + c] += part[c] * s0, acc[kAt + c + 1] += part[c + 1] * s0;
    acc[kAt + c + 2] += part[c + 2] * s1, acc[kAt + c + 3] += part[c + 3] * s1;
  }
}

// acc[t] = row tile t of this warpgroup times kN tokens, over all of K. While the matrix unit works
// on one scale group the next one's codes are loaded and decoded. A wide tile's columns are two
// parts: the first is added up while the matrix unit works on the second.
template <int kN>
__device__ __forceinline__ void multiply(float (&acc)[kPerWg][kN / 2], int stages,
                                         const Ring& ring, Place& from) {
  Place place{uniform(from.slot), static_cast<u32>(uniform(from.phase))};
  const int thread = threadIdx.x & 127, wg = threadIdx.x >> 7, lane = threadIdx.x & 31;
  constexpr int kParts = kPerWg * kGroups;  // of a half
  constexpr int kFirst = kN < 64 ? kN : kN == 112 ? 64 : kN / 2, kSecond = kN - kFirst;
  const u32 w_at = kWeightsAt + wg * kPerWg * kTileBytes + thread * 16;
  const u32 s_at = kScalesAt + wg * kPerWg * kTileScaleBytes +
                   ((thread >> 5) * 8 + (lane >> 2)) * 4;
#pragma unroll
  for (int t = 0; t < kPerWg; ++t) {
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) acc[t][i] = 0.0f;
  }
  Fragment f[2];
  u32 stage = ring.stage(place.slot);
  barrier_wait(ring.weights_full(place.slot), place.phase);
  load_fragment(f[0], stage + w_at, stage + s_at, 0, 0);
  const int halves = stages * kHalves;
#pragma unroll 1
  for (int i = 0; i < halves; ++i) {
    const int half = i % kHalves;
    const bool last_half = half == kHalves - 1;
    const u32 codes = stage + half * (kK * 32), scales = stage + half * (kGroups * 128);
    const u64 b = panel_descriptor(stage + half * kTokenBytes);
    barrier_wait(ring.tokens_full(place.slot, half), place.phase);
    fence_async_proxy();  // the copies were ordinary writes; the matrix unit reads past them
#pragma unroll
    for (int at = 0; at < kParts; ++at) {
      const int tile = at % kPerWg, group = at / kPerWg;
      Fragment& now = f[at & 1];
      Fragment& then = f[(at + 1) & 1];
      float first[kFirst / 2], second[kSecond > 0 ? kSecond / 2 : 1];
      issue<kFirst>(first, now, b, group);
      if constexpr (kSecond > 0) issue<kSecond>(second, now, b + kFirst * kPanel / 16, group);
      if (at + 1 < kParts) {
        load_fragment(then, codes + w_at, scales + s_at, (at + 1) % kPerWg, (at + 1) / kPerWg);
      } else if (!last_half) {
        load_fragment(then, codes + kK * 32 + w_at, scales + kGroups * 128 + s_at, 0, 0);
      } else {
        place.advance(ring.size);
        stage = ring.stage(place.slot);
        if (i + 1 < halves) {
          barrier_wait(ring.weights_full(place.slot), place.phase);
          load_fragment(then, stage + w_at, stage + s_at, 0, 0);
        }
      }
      if constexpr (kSecond > 0) {
        mma_wait<1>();
        pin(first);
        add<0>(acc[tile], first, now.scales);
      }
      mma_wait<0>();
      if constexpr (kSecond > 0) {
        pin(second);
      } else {
        pin(first);
      }
      if (at + 1 == kParts && last_half) {
        release_stage(ring.empty(place.before(ring.size)));
      }
      if constexpr (kSecond > 0) {
        add<kFirst / 2>(acc[tile], second, now.scales);
      } else {
        add<0>(acc[tile], first, now.scales);
      }
    }
    if constexpr (kParts % 2) f[0] = f[1];
  }
  from = place;
}

// acc = the row tile of this warpgroup times kN tokens, over all of K: what three warpgroups do, of
// which two have work for the matrix unit while one scales, adds and decodes.
template <int kN, class Way>
__device__ __forceinline__ void multiply_one(float (&acc)[kN / 2], int stages, const Ring& ring,
                                             Way& from, bool gathered) {
  Way place = from;
  place.slot = uniform(from.slot), place.phase = static_cast<u32>(uniform(from.phase));
  u32 tid = threadIdx.x;
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) acc[i] = 0.0f;
#pragma unroll 1
  for (int i = 0; i < stages; ++i) {
    const u32 stage = ring.stage(place.slot);
    const u64 b = panel_descriptor(stage);
    if constexpr (Way::kReadsThread) asm volatile("mov.u32 %0, %%tid.x;" : "=r"(tid));
    const u32 thread = tid & 127, wg = tid >> 7, lane = tid & 31;
    const u32 w_at = kWeightsAt + wg * kTileBytes + thread * 16;
    const u32 s_at = kScalesAt + wg * kTileScaleBytes + ((thread >> 5) * 8 + (lane >> 2)) * 4;
    barrier_wait(ring.weights_full(place.slot), place.parity());
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      Fragment f;
      load_fragment(f, stage + w_at, stage + s_at, 0, group);
      if (group == 0) {
        barrier_wait(ring.tokens_full(place.slot, 0), place.parity());
        if (gathered) fence_async_proxy();  // then tokens were ordinary writes
      }
      float part[kN / 2];
      issue<kN>(part, f, b, group);
      mma_wait<0>();
      pin(part);
      if (group == kGroups - 1) release_stage(ring.empty(place.slot));
      add<0>(acc, part, f.scales);
    }
    place.advance(ring.size);
  }
  from = place;
}

// Calls body.run<kN>() with the fewest columns that hold `count` tokens.
template <class Body>
__device__ __forceinline__ void with_columns(int count, Body& body) {
  switch ((uniform(count) + 15) / 16) {
    case 1: return body.template run<16>();
    case 2: return body.template run<32>();
    case 3: return body.template run<48>();
    case 4: return body.template run<64>();
    case 5: return body.template run<80>();
    case 6: return body.template run<96>();
    case 7: return body.template run<112>();
    default: return body.template run<128>();
  }
}
