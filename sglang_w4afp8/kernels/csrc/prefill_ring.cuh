// The ring of stages that the matrix kernels of the prefill path share: its sizes and barriers, the
// items that are worked on, and who claims them. What travels through it: prefill_produce.cuh.
//
// With W4_CLUSTER=2 two CTAs work on two tiles of an expert at a time, with the same weights: each
// copies half of a stage's weights to both. They go in step, as a stage is copied to again when
// both are through with it. Their items are dealt out in turn, not claimed; none may wait for
// another's.
//
// W4_K, W4_TILES: the cut of the weights (hopper/layout.py). W4_GROUP, W4_MINUS_EIGHT: as ever.
// W4_SORTED, W4_ROW_SCALES: see below.
#pragma once
#include "primitives.cuh"

// The same value in all lanes, known to the compiler as such: what branches on it keeps addresses
// and descriptors in uniform registers.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

constexpr int kSpan = W4_K, kLayoutTiles = W4_TILES, kGroup = W4_GROUP, kPerWg = W4_PER_WG;
constexpr bool kMinusEight = W4_MINUS_EIGHT != 0;
#ifndef W4_CLUSTER
#define W4_CLUSTER 1
#endif
constexpr int kCluster = W4_CLUSTER;
constexpr int kWgs = 2;  // consumer warpgroups
// Whether tokens are in the order of the list, if all of them have room (prefill_sort.cuh, Sorted).
#ifndef W4_SORTED
#define W4_SORTED 0
#endif
constexpr bool kSorted = W4_SORTED != 0;
constexpr int kTokens = kSorted ? 192 : 128;  // most of a tile
// Whether tokens came in E4M3 with a scale for each 128 columns.
#ifndef W4_ROW_SCALES
#define W4_ROW_SCALES 0
#endif
constexpr bool kRowScales = W4_ROW_SCALES != 0;
// A stage of the ring is a stage of the layout: its weights come in one or two large copies, as
// many small ones do not fill the memory's bandwidth. Tokens come in halves of 128 columns. With
// tokens in the order of the list a stage of the layout is cut into stages of 128 columns.
constexpr int kCuts = kSorted && kSpan == 256 ? 2 : 1;
constexpr int kStageK = kSpan / kCuts;
constexpr int kHalves = kStageK == 256 ? 2 : 1;
constexpr int kK = kStageK / kHalves;
constexpr int kGroups = kK / kGroup;                  // scale groups of a half
constexpr int kSteps = kGroup / 32;                   // wgmmas per scale group
constexpr int kRowTiles = kWgs * kPerWg;
constexpr int kTileBytes = kStageK * 32;              // INT4 of 64 rows
constexpr int kTileScaleBytes = kStageK / kGroup * 128;
constexpr int kWeightBytes = kRowTiles * kTileBytes;
constexpr int kScaleBytes = kRowTiles * kTileScaleBytes;
constexpr int kTokenBytes = kTokens * kK;             // of a half
// Tokens lie in panels of 128 or 64 columns, a row of 128 or 64 bytes for each token, swizzled as
// the matrix unit knows it: 16-byte piece p of row r is at p ^ (r % 8), or p ^ (r / 2 % 4). Eight
// lanes copy a row (or two) at a time, whole lines of memory, without bank conflicts.
constexpr int kPanel = kK == 128 ? 128 : 64;
constexpr int kPieces = kPanel / 16;
constexpr int kRowsAtOnce = 32 / kPieces;
constexpr int kWeightsAt = kHalves * kTokenBytes, kScalesAt = kWeightsAt + kWeightBytes;
constexpr int kColumnScalesAt = kScalesAt + kScaleBytes;  // floats
constexpr int kStageBytes =
    (kColumnScalesAt + (kRowScales ? kTokens * 4 : 0) + 1023) / 1024 * 1024;
constexpr int kConsumers = kWgs * 128;
constexpr int kThreads = kConsumers + 128;
// Slots for items that are claimed: the one that is worked on, and the next. With more, items that
// read the same weights or tokens would begin at times that lie further apart, and the last ones
// would belong to CTAs that are late.
constexpr int kQueue = 2;
constexpr int kTokenArrivals = 64;  // of a half: the lanes of two warps
constexpr int kBars = 32;  // bytes of a stage's barriers: weights, two halves of tokens, empty
static_assert(kK % 64 == 0 && kK % kGroup == 0 && (kCluster == 1 || !kSorted), "");
static_assert(!kSorted || kPerWg == 1, "");
static_assert(!kRowScales || (kSorted && kStageK == 128), "a stage is a span");

// The list of one batch of pairs, sorted by expert (prefill_route.cu).
struct Tile {
  int expert, first, count, unused;  // columns[first .. first + count)
};

enum Kind { kEnd, kMatrix, kRest };  // kRest: no stages, only consumers see it

struct __align__(16) Item {
  int kind, expert, first, count;
  union {
    int tile;   // up: number of the tile
    int slice;  // down: see Slices
  };
  int block, step, list;  // block of kRowTiles row tiles; down: number of the tile
};

struct Queue {
  Item item[kQueue];
};

// Shared-memory addresses: stages, what is free behind them, their barriers, the queue's barriers.
struct Ring {
  u32 stages, end, bars, queue_bars;
  int size;
  __device__ __forceinline__ u32 weights_full(int slot) const { return bars + slot * kBars; }
  __device__ __forceinline__ u32 tokens_full(int slot, int half) const {
    return bars + slot * kBars + 8 + half * 8;
  }
  __device__ __forceinline__ u32 empty(int slot) const { return bars + slot * kBars + 24; }
  __device__ __forceinline__ u32 stage(int slot) const { return stages + slot * kStageBytes; }
};

// A role's way around the ring.
struct Place {
  int slot = 0;
  u32 phase = 0;
  __device__ __forceinline__ void advance(int size) {
    if (++slot == size) slot = 0, phase ^= 1;
  }
  __device__ __forceinline__ u32 parity() const { return phase; }
};
// A consumer's, with the number of its item.
struct ItemPlace : Place {
  int items = 0;
  __device__ __forceinline__ int number() const { return items; }
  __device__ __forceinline__ void next_item() { ++items; }
};
// The same where registers are short: the number is in the other bits of the phase.
struct CountingPlace : Place {
  __device__ __forceinline__ u32 parity() const { return phase & 1; }
  __device__ __forceinline__ int number() const { return static_cast<int>(phase >> 1); }
  __device__ __forceinline__ void next_item() { phase += 2; }
};

// ---- claiming -----------------------------------------------------------------------------------
// One lane: the number of this CTA's i-th item. The CTAs of a cluster get the same.
__device__ __forceinline__ u32 claim_number(u32* counter, int i) {
  return kCluster == 1 ? atomicAdd(counter, 1u) : (blockIdx.x + i * gridDim.x) / kCluster;
}
// One lane. `describe(number)` gives item `number`, kEnd past the last one. An item is claimed no
// sooner than it has a slot.
template <class Describe>
__device__ __forceinline__ void claim(Queue& queue, const Ring& ring, u32* counter,
                                      Describe describe) {
  for (int i = 0;; ++i) {
    const u32 bar = ring.queue_bars + i % kQueue * 16;
    barrier_wait(bar + 8, ((i / kQueue) & 1) ^ 1);
    const Item item = describe(claim_number(counter, i));
    queue.item[i % kQueue] = item;
    barrier_arrive(bar);
    if (item.kind == kEnd) return;
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
  __device__ __forceinline__ void release(const Ring& ring, u32 times = 1) {
    __syncwarp();
    if (kEveryLane || (threadIdx.x & 31) == 0) {
      barrier_arrive(ring.queue_bars + number % kQueue * 16 + 8, times);
    }
    ++number;
  }
  // The next item that has stages, or the end. `times`: as how many warps it counts.
  __device__ __forceinline__ Item next(const Queue& queue, const Ring& ring, u32 times = 1) {
    for (;;) {
      const Item item = wait(queue, ring);
      release(ring, times);
      if (item.kind != kRest) return item;
    }
  }
};

// ---- stages -------------------------------------------------------------------------------------
// Read where they are wanted, as the loops over K have no registers for them.
__device__ __forceinline__ u32 read_lane() {
  u32 lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}
__device__ __forceinline__ u32 read_thread() {
  u32 thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// A consumer warp is through with a stage; with a cluster both CTAs' producers must know.
__device__ __forceinline__ void release_stage(u32 empty, u32 lane) {
  __syncwarp();
  if constexpr (kCluster == 1) {
    if (kEveryLane || lane == 0) barrier_arrive(empty);
  } else if constexpr (!kEveryLane) {
    if (lane < kCluster) barrier_arrive_at(empty, lane);
  } else {
    for (u32 to = 0; to < kCluster; ++to) barrier_arrive_at(empty, to);
  }
}

// Until a stage is there of a call with tokens in the order of the list: then one barrier is for
// all of it, as one warp copies all. `gathered`: tokens were copied by lanes.
template <class Way>
__device__ __forceinline__ void wait_listed(const Ring& ring, const Way& place, bool gathered) {
  barrier_wait(ring.tokens_full(place.slot, 0), place.parity());
  if (gathered) {
    barrier_wait(ring.weights_full(place.slot), place.parity());
    fence_async_proxy();  // the matrix unit reads past ordinary writes
  }
}

// Lets the stages of an item without tokens pass, or without rows for this warpgroup. Waits for who
// copies tokens, too, even where there are none: who falls a round of the ring behind cannot tell
// the phases of its barriers apart any more.
template <class Way>
__device__ __forceinline__ void pass(int stages, const Ring& ring, Way& place, bool gathered) {
  for (int i = 0; i < stages; ++i) {
    if constexpr (kSorted) {
      wait_listed(ring, place, gathered);
    } else {
      barrier_wait(ring.weights_full(place.slot), place.parity());
      for (int h = 0; h < kHalves; ++h) {
        barrier_wait(ring.tokens_full(place.slot, h), place.parity());
      }
    }
    release_stage(ring.empty(place.slot), read_lane());
    place.advance(ring.size);
  }
}

// ---- set-up -------------------------------------------------------------------------------------
// `extra`: bytes that the caller wants behind the stages. `readers`: warps that read items.
__device__ __forceinline__ Ring make_ring(u8* shared, int size, int extra,
                                          int readers = kReaders) {
  Ring ring;
  ring.stages = (smem_address(shared) + 1023) & ~1023u;  // swizzled rows repeat after 1 KB
  ring.end = ring.stages + size * kStageBytes;
  ring.bars = ring.end + extra;
  ring.queue_bars = ring.bars + size * kBars;
  ring.size = size;
  if (threadIdx.x == 0) {
    for (int i = 0; i < size; ++i) {
      barrier_init(ring.weights_full(i), 1);
      for (int h = 0; h < kHalves; ++h) barrier_init(ring.tokens_full(i, h), kTokenArrivals);
      barrier_init(ring.empty(i), kCluster * kConsumers / 32 * kLanes);
    }
    for (int i = 0; i < kQueue; ++i) {
      barrier_init(ring.queue_bars + i * 16, 1);
      barrier_init(ring.queue_bars + i * 16 + 8, readers * kLanes);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if constexpr (kCluster > 1) cluster_sync();  // nobody arrives at a barrier that is not there yet
  return ring;
}

// The register file is the consumers'. A CTA begins with 168 for each of 384 threads; what they
// take is what the others give, or less: who asked for more would wait for ever.
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kSorted ? 224 : 232));
}
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kSorted ? 56 : 40));
}
