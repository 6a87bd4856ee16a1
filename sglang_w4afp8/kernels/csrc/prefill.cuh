// What the two matrix kernels of the prefill path share: the ring, its producers, the loop over K.
//
// A work item is a tile of at most 128 tokens of one expert times 256 rows of weights (128 with
// W4_PER_WG=1). Two consumer warpgroups own W4_PER_WG row tiles of 64 rows each and see the same
// tokens. The number of columns is chosen per item, in steps of 16: a tile computes no more than
// its tokens need. Items are claimed from a counter in their order, so that an item may wait for
// earlier ones without all CTAs being resident; results do not depend on who claims what.
//
// W4_K, W4_TILES: the cut of the weights (hopper/layout.py). W4_GROUP, W4_MINUS_EIGHT: as ever.
#pragma once
#include "mma_wide.cuh"

constexpr int kLayoutK = W4_K, kLayoutTiles = W4_TILES, kGroup = W4_GROUP, kPerWg = W4_PER_WG;
constexpr bool kMinusEight = W4_MINUS_EIGHT != 0;
constexpr int kTokens = 128;
constexpr int kK = kLayoutK == 256 ? 128 : kLayoutK;  // columns of a stage
constexpr int kGroups = kK / kGroup;
constexpr int kSteps = kGroup / 32;                   // wgmmas per scale group
constexpr int kRowTiles = 2 * kPerWg;
constexpr int kTileBytes = kK * 32;                   // INT4 of 64 rows
constexpr int kTileScaleBytes = kGroups * 128;
constexpr int kWeightBytes = kRowTiles * kTileBytes;
constexpr int kScaleBytes = kRowTiles * kTileScaleBytes;
constexpr int kTokenBytes = kTokens * kK;
constexpr int kStageBytes = kWeightBytes + kScaleBytes + kTokenBytes;
constexpr int kToken8Stride = kK * 8;
constexpr int kConsumers = 256;
constexpr int kThreads = kConsumers + 128;
constexpr int kQueue = 8;  // items that are claimed ahead
constexpr int kLate = 2;   // stages of tokens in flight before the first is handed over
static_assert(kK % 64 == 0 && kK % kGroup == 0, "");

// The list of one batch of pairs, sorted by expert (prefill_route.cu).
struct Tile {
  int expert, first, count, unused;  // columns[first .. first + count)
};

enum Kind { kEnd, kMatrix, kCombine };

struct __align__(16) Item {
  int kind, expert, first, count;
  int tile, block, slice, list;
};

struct Queue {
  Item item[kQueue];
};

// Shared-memory addresses. Barriers: full and empty of each stage, then of each queue entry.
struct Ring {
  u32 stages, bars, queue_bars;
  int size;
  __device__ __forceinline__ u32 full(int slot) const { return bars + slot * 16; }
  __device__ __forceinline__ u32 stage(int slot) const { return stages + slot * kStageBytes; }
};

struct Weights {
  const u8* w;       // (E, rows, K / 2) in stage order
  const u8* scales;  // (E, rows, K / group) bfloat16 in stage order
  int rows, k;
};

// ---- claiming ------------------------------------------------------------------------------------
// One lane. `describe(number)` gives item `number`, kEnd past the last one. kBatch items are claimed
// at once: a claim and a look at the lists take longer than a short item.
template <int kBatch, class Describe>
__device__ __forceinline__ void claim(Queue& queue, const Ring& ring, u32* counter,
                                      Describe describe) {
  u32 next = atomicAdd(counter, kBatch);
  for (int i = 0;;) {
    const u32 number = next;
    next = atomicAdd(counter, kBatch);
    Item item[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) item[j] = describe(number + j);
#pragma unroll
    for (int j = 0; j < kBatch; ++j, ++i) {
      const u32 bar = ring.queue_bars + (i % kQueue) * 16;
      barrier_wait(bar + 8, ((i / kQueue) & 1) ^ 1);
      queue.item[i % kQueue] = item[j];
      barrier_arrive(bar);
      if (item[j].kind == kEnd) return;
    }
  }
}

// A whole warp: items in turn. An item may be overwritten once it has been released.
constexpr int kReaders = kConsumers / 32 + 3;
struct Reader {
  int number = 0;
  __device__ __forceinline__ const Item& wait(const Queue& queue, const Ring& ring) {
    const int slot = number % kQueue;
    barrier_wait(ring.queue_bars + slot * 16, (number / kQueue) & 1);
    return queue.item[slot];
  }
  __device__ __forceinline__ void release(const Ring& ring) {
    __syncwarp();
    if ((threadIdx.x & 31) == 0) {
      barrier_arrive(ring.queue_bars + number % kQueue * 16 + 8);
    }
    ++number;
  }
  __device__ __forceinline__ Item next(const Queue& queue, const Ring& ring) {
    const Item item = wait(queue, ring);
    release(ring);
    return item;
  }
};

// ---- producers -----------------------------------------------------------------------------------
// One warp: a lane for each row tile's weights and one for each row tile's scales.
__device__ __forceinline__ void produce_weights(const Weights& p, const Queue& queue,
                                                const Ring& ring) {
  const int lane = threadIdx.x & 31, tiles = p.rows / 64, stages = p.k / kK;
  const bool is_scale = lane >= kRowTiles;
  const int row = is_scale ? lane - kRowTiles : lane;
  constexpr int kPerLayout = kLayoutK / kK;  // stages in a stage of the layout
  Reader reader;
  int slot = 0;
  u32 phase = 0;
  for (;;) {
    const Item item = reader.next(queue, ring);
    if (item.kind == kEnd) return;
    if (item.kind != kMatrix) continue;
    const int row_tiles = min(kRowTiles, tiles - item.block * kRowTiles);
    const int tile = item.block * kRowTiles + row;
    const int outer = tile / (2 * kLayoutTiles), inner = tile % (2 * kLayoutTiles);
    const int beside = min(2 * kLayoutTiles, tiles - outer * 2 * kLayoutTiles);
    const bool copies = lane < 2 * kRowTiles && row < row_tiles;
    const u64 per_row = is_scale ? p.k / kGroup * 2 : p.k / 2;
    const u32 layout_bytes = is_scale ? kLayoutK / kGroup * 128 : kLayoutK * 32;
    const u32 bytes = is_scale ? kTileScaleBytes : kTileBytes;
    const u8* from = (is_scale ? p.scales : p.w) + item.expert * (p.rows * per_row) +
                     (static_cast<u64>(outer) * 2 * kLayoutTiles * 64) * per_row +
                     inner * layout_bytes;
    const u32 to = is_scale ? kWeightBytes + row * kTileScaleBytes : row * kTileBytes;
    for (int step = 0; step < stages; ++step) {
      const u32 full = ring.full(slot);
      barrier_wait(full + 8, phase ^ 1);
      if (lane == 0) barrier_expect(full, row_tiles * (kTileBytes + kTileScaleBytes));
      __syncwarp();
      if (copies) {
        bulk_copy(ring.stage(slot) + to,
                  from + static_cast<u64>(step / kPerLayout) * beside * layout_bytes +
                      step % kPerLayout * bytes,
                  bytes, full);
      }
      if (++slot == ring.size) slot = 0, phase ^= 1;
    }
  }
}

// Two warps, `half` 0 and 1: the rows of the item's tokens, every second group of eight each.
// `row(pair)` is where a pair's K bytes begin.
template <class Row>
__device__ __forceinline__ void produce_tokens(int k, const int* columns, int list_stride,
                                               const Queue& queue, const Ring& ring, int half,
                                               Row row) {
  const int lane = threadIdx.x & 31, stages = k / kK;
  constexpr int kMine = kTokens / 16;
  Reader reader;
  int slot = 0, handed = 0, filled = 0;
  u32 phase = 0;
  auto hand_over = [&]() {
    fence_async_proxy();
    __syncwarp();
    if (lane == 0) barrier_arrive(ring.full(handed));
    if (++handed == ring.size) handed = 0;
  };
  for (;;) {
    const Item item = reader.next(queue, ring);
    if (item.kind == kEnd) break;
    if (item.kind != kMatrix) continue;
    const u8* from[kMine];
    const int* list = columns + static_cast<u64>(item.list) * list_stride + item.first;
#pragma unroll
    for (int j = 0; j < kMine; ++j) {
      const int c = (2 * j + half) * 8 + (lane & 7);
      from[j] = c < item.count ? row(list[c]) + (lane >> 3) * 16 : nullptr;
    }
    for (int step = 0; step < stages; ++step) {
      const u32 full = ring.full(slot);
      barrier_wait(full + 8, phase ^ 1);
      // 8 tokens x 4 pieces of 16 bytes per instruction: conflict-free writes.
      const u32 to = ring.stage(slot) + kWeightBytes + kScaleBytes + half * kToken8Stride +
                     (lane >> 3) * 128 + (lane & 7) * 16;
#pragma unroll
      for (int j = 0; j < kMine; ++j) {
        if (from[j] != nullptr) {
#pragma unroll
          for (int i = 0; i < kK / 64; ++i) {
            async_copy16(to + 2 * j * kToken8Stride + i * 512, from[j] + step * kK + i * 64);
          }
        }
      }
      async_copy_commit();
      if (filled == kLate) {
        async_copy_wait<kLate>();
        hand_over();
      } else {
        ++filled;
      }
      if (++slot == ring.size) slot = 0, phase ^= 1;
    }
  }
  async_copy_wait<0>();
  while (filled-- > 0) hand_over();
}

// ---- the loop over K -----------------------------------------------------------------------------
// This thread's codes of one scale group as wgmma wants them, and its two row scales.
struct Fragment {
  u32 a[kSteps * 4];
  u32 scales;
};

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

// Where a consumer warpgroup is in the ring.
struct Place {
  int slot = 0;
  u32 phase = 0;
};

// acc[t] = row tile t of this warpgroup times kN tokens, over all of K. While the matrix unit works
// on one scale group the next one's codes are loaded and decoded.
template <int kN>
__device__ __forceinline__ void multiply(float (&acc)[kPerWg][kN / 2], int stages,
                                         const Ring& ring, Place& place) {
  const int thread = threadIdx.x & 127, wg = threadIdx.x >> 7, lane = threadIdx.x & 31;
  constexpr int kItems = kPerWg * kGroups;
  const u32 w_at = wg * kPerWg * kTileBytes + thread * 16;
  const u32 s_at = kWeightBytes + wg * kPerWg * kTileScaleBytes +
                   ((thread >> 5) * 8 + (lane >> 2)) * 4;
#pragma unroll
  for (int t = 0; t < kPerWg; ++t) {
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) acc[t][i] = 0.0f;
  }
  Fragment f[2];
  u32 stage = ring.stage(place.slot);
  barrier_wait(ring.full(place.slot), place.phase);
  load_fragment(f[0], stage + w_at, stage + s_at, 0, 0);
#pragma unroll 1
  for (int i = 0; i < stages; ++i) {
    const u32 full = ring.full(place.slot);
    const u64 b = token_descriptor(stage + kWeightBytes + kScaleBytes, kToken8Stride);
    if (++place.slot == ring.size) place.slot = 0, place.phase ^= 1;
    const u32 next = ring.stage(place.slot);
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      const int tile = item % kPerWg, group = item / kPerWg;
      Fragment& now = f[item & 1];
      Fragment& then = f[(item + 1) & 1];
      float part[kN / 2];
      pin(part);
      mma_fence();
      // 32 columns of K are two core matrices, 256 bytes, 16 units of a descriptor's address.
#pragma unroll
      for (int j = 0; j < kSteps; ++j) {
        Mma<kN>::issue(part, now.a[4 * j], now.a[4 * j + 1], now.a[4 * j + 2], now.a[4 * j + 3],
                       b + (group * kSteps + j) * 16, j);
      }
      mma_commit();
      if (item + 1 < kItems) {
        load_fragment(then, stage + w_at, stage + s_at, (item + 1) % kPerWg,
                      (item + 1) / kPerWg);
      } else if (i + 1 < stages) {
        barrier_wait(ring.full(place.slot), place.phase);
        load_fragment(then, next + w_at, next + s_at, 0, 0);
      }
      mma_wait<0>();
      pin(part);
      if (item + 1 == kItems) {
        __syncwarp();
        if (lane == 0) barrier_arrive(full + 8);
      }
      const float s0 = bf16_low(now.scales), s1 = bf16_high(now.scales);
#pragma unroll
      for (int c = 0; c < kN / 2; c += 4) {
        acc[tile][c] += part[c] * s0, acc[tile][c + 1] += part[c + 1] * s0;
        acc[tile][c + 2] += part[c + 2] * s1, acc[tile][c + 3] += part[c + 3] * s1;
      }
    }
    if constexpr (kItems % 2) f[0] = f[1];
    stage = next;
  }
}

// Calls body.run<kN>() with the fewest columns that hold `count` tokens.
template <class Body>
__device__ __forceinline__ void with_columns(int count, Body& body) {
  switch ((count + 15) / 16) {
    case 1: return body.template run<16>();
    case 2: return body.template run<32>();
    case 3: return body.template run<48>();
    case 4: return body.template run<64>();
    case 5: return body.template run<80>();
    case 6: return body.template run<96>();
#ifdef TEST_ONE
    default: return body.template run<TEST_ONE>();
#else
    case 7: return body.template run<112>();
    default: return body.template run<128>();
#endif
  }
}

// ---- set-up --------------------------------------------------------------------------------------
__device__ __forceinline__ Ring make_ring(u8* shared, int size) {
  Ring ring;
  ring.stages = smem_address(shared);
  ring.bars = ring.stages + size * kStageBytes;
  ring.queue_bars = ring.bars + size * 16;
  ring.size = size;
  if (threadIdx.x == 0) {
    for (int i = 0; i < size; ++i) {
      barrier_init(ring.full(i), 3);  // weights and scales; two token warps
      barrier_init(ring.full(i) + 8, kConsumers / 32);
    }
    for (int i = 0; i < kQueue; ++i) {
      barrier_init(ring.queue_bars + i * 16, 1);
      barrier_init(ring.queue_bars + i * 16 + 8, kReaders);
    }
    barrier_init_fence();
  }
  __syncthreads();
  return ring;
}

// The register file is the consumers'; producers have addresses only.
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
}
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
}
