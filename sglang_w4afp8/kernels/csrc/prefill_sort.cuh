// Of prefill_route.cu: its arguments, and the blocks that sort pairs by expert.
#pragma once
#include "prefill_listed.cuh"
#include "primitives.cuh"

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxExperts = 512;
constexpr int kMine = 8;      // pairs of a sorting thread
constexpr int kPart = kThreads * kMine;  // most pairs of a part
static_assert(kPart == 4096, "");

struct Tile {
  int expert, first, count, unused;
};

struct Lists {
  Tile* tiles;   // (count, max_tiles)
  int* header;   // (count) number of tiles
  int* columns;  // (count, pairs)
  int* first;    // (count, kMaxExperts + 1) where experts' columns begin: instead of tiles, or null
  int count, parts, max_tiles;  // a list has `parts` parts, the last may have fewer pairs
  int together;                 // an expert's tiles are a multiple of it; a power of two
  int tile_tokens;              // most of a tile; a multiple of 16
};

// What prefill_down.cu wants, or place null.
struct Sorted {
  ListPlace* place;      // (M, top_k)
  Owner* owners;         // (M * top_k)
  Part* parts;           // (M * top_k, most_parts) of rows whose count is more than 1
  int* total;            // (1) pairs
  int* slots;            // (1) slots of y in use
  const float* weights;  // (M, top_k)
  u8* empty;             // (M) whether a token has no pair
  Listed listed;         // xq, if all pairs fit
  int room;              // rows of it
  int top_k, most_parts;
};

// A pair in its list of prefill_own_down.cu.
struct Column {
  int pair;
  float weight;
};

// What prefill_own_down.cu wants, or columns null.
struct Own {
  Column* columns;        // as those of its lists
  int* rows;              // as up's columns: where a pair's row of q is, see q_row
  int* twice;             // (parts) whether a token names an expert twice
  float* sizes;           // (M, top_k) the weight's absolute value, 0 for a pair that is not ours
  float* largest;         // (E) the largest finite scale of w2, whatever its sign, or 2^-100
  u64* counts;            // (sorters, kMaxExperts) pairs by class, see prefill_sort_own.cuh
  const float* weights;   // (M, top_k)
  const u16* w2_scale;    // (E, expert_scales) bfloat16
  int expert_scales, top_k;
};

struct PrefillRouteParams {
  const u16* x;          // (M, hidden) bfloat16, or E4M3 with W4_ROW_SCALES
  const void* ids;       // (M, top_k) int32 or int64
  u8* xq;                // (M, hidden) E4M3, or as Listed has it
  float* x_scale;        // (M) what a column's result is multiplied by
  const float* a_scale;  // (1) static scale, or null: amax of the row / 448
  Lists up, down;        // down.count is 0 where both kernels use the same lists
  Own own;
  Sorted sorted;
  u32* counts;           // (sorters, kMaxExperts)
  u32* arrived;          // sorters that have published, and times 2^16 those that are through; zero
                         // before; the next kernel zeroes it
  u32* zeros;            // counters of the kernels that follow
  int tokens, pairs, hidden, experts, zero_count, ids_are_64, sorters, part_pairs;
};

// A row of q in the order of down's list, and its number among the expert's rows there modulo 8:
// rows are swizzled in memory as the matrix unit wants them, so that down copies many at once.
__device__ __forceinline__ int q_row(u64 row, int of_expert) {
  return static_cast<int>(row) | (of_expert & 7) << 28;
}

__device__ __forceinline__ int expert_of(const PrefillRouteParams& p, int pair) {
  const long long id = p.ids_are_64 ? static_cast<const long long*>(p.ids)[pair]
                                    : static_cast<const int*>(p.ids)[pair];
  return id >= 0 && id < p.experts ? static_cast<int>(id) : -1;
}

// For each class, of pairs or tiles, a number: 16 bits, enough for an expert's pairs of a list and
// for a list's tiles. The lowest is class 0.
constexpr int kClasses = 4;

__device__ __forceinline__ int of_class(u64 four, int k) { return four >> 16 * k & 0xffff; }
// What the classes before each one have, and what all have.
__device__ __forceinline__ u64 sums_before(u64 four) { return four * 0x0001000100010000ull; }
__device__ __forceinline__ int sum_of(u64 four) { return four * 0x0001000100010001ull >> 48; }

// Of the warps of a block that sorts: how many pairs their experts have, and tiles of each class.
struct WarpSums {
  int pairs[kWarps];
  u64 tiles[kWarps];
};

// What the lanes up to this one have.
__device__ __forceinline__ void sums_up_to(int& pairs, u64& tiles) {
  const int lane = threadIdx.x & 31;
  for (int d = 1; d < 32; d <<= 1) {
    const int a = __shfl_up_sync(0xffffffffu, pairs, d);
    const u64 b = __shfl_up_sync(0xffffffffu, tiles, d);
    if (lane >= d) pairs += a, tiles += b;
  }
}

// Thread e of the block of part `part`: where expert e's pairs of this part begin in its list, and
// where all of them do. The first part of a list also writes its tiles.
struct Begin {
  int mine, all;
};
__device__ Begin place_part(const PrefillRouteParams& p, const Lists& lists, int part,
                            WarpSums& sums) {
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31;
  const int list = part / lists.parts, first_part = list * lists.parts;
  const int last_part = min(first_part + lists.parts, p.sorters);
  int before = 0, tokens = 0;
#pragma unroll 8
  for (int i = first_part; i < last_part; ++i) {
    const int n = __ldcg(p.counts + i * kMaxExperts + tid);
    before += i < part ? n : 0;
    tokens += n;
  }
  // Tiles of equal size but for a step of columns: only the last may have columns without a token,
  // or, with clusters, no token at all. `size`: of the widest.
  const int least = (tokens + lists.tile_tokens - 1) / lists.tile_tokens;
  const int tiles = (least + lists.together - 1) & -lists.together;
  const int share = tiles > 0 ? (tokens + tiles - 1) / tiles : 0;
  const int step = share > 96 ? 8 : 16;  // as with_columns (prefill.cuh) has them
  const int all_steps = (tokens + step - 1) / step;
  const int steps = tiles > 0 ? all_steps / tiles : 0, wider = all_steps - steps * tiles;
  const int size = (steps + (wider > 0)) * step;
  // Wide tiles first: one begun near the end should not take long. Narrow ones differ little. In
  // the order of the list tiles are in that of their rows; with clusters this order was slower.
  const bool ordered = p.sorted.place == nullptr && lists.together == 1;
  const int kind = ordered ? (size <= 96) + (size <= 64) : 0;
  int pair_sum = tokens;
  u64 tile_sum = static_cast<u64>(tiles) << 16 * kind;
  sums_up_to(pair_sum, tile_sum);
  __syncthreads();
  if (lane == 31) sums.pairs[warp] = pair_sum, sums.tiles[warp] = tile_sum;
  __syncthreads();
  int warp_pairs = lane < kWarps ? sums.pairs[lane] : 0;
  u64 warp_tiles = lane < kWarps ? sums.tiles[lane] : 0;
  sums_up_to(warp_pairs, warp_tiles);
  const u64 of_warps = __shfl_sync(0xffffffffu, warp_tiles, 31);
  tile_sum += __shfl_sync(0xffffffffu, warp_tiles, warp) - sums.tiles[warp];
  pair_sum += __shfl_sync(0xffffffffu, warp_pairs, warp) - sums.pairs[warp];
  const int first = pair_sum - tokens;
  const int tile = of_class(sums_before(of_warps), kind) + of_class(tile_sum, kind) - tiles;
  if (part == first_part && lists.first != nullptr) {
    int* out = lists.first + static_cast<u64>(list) * (kMaxExperts + 1);
    out[tid] = first;
    if (tid == kThreads - 1) out[kMaxExperts] = first + tokens;
  } else if (part == first_part) {
    if (tid == kThreads - 1) lists.header[list] = sum_of(of_warps);
    Tile* out = lists.tiles + static_cast<u64>(list) * lists.max_tiles + tile;
    for (int i = 0, at = 0; i < tiles; ++i) {
      const int here = min((steps + (i < wider)) * step, tokens - at);
      out[i] = Tile{tid, first + at, here, 0};
      at += here;
    }
  }
  if (part == first_part && p.sorted.place != nullptr && tid == kThreads - 1) {
    *p.sorted.total = first + tokens;
    *p.sorted.slots = 0;
  }
  return Begin{first + before, first};
}

// One block: publishes the counts that all its threads have written, and waits for the others'.
__device__ __forceinline__ void exchange_counts(const PrefillRouteParams& p) {
  __syncthreads();
  if (threadIdx.x == 0) {
    // Blocks start in order and two fit on an SM: with no more sorters than that (hopper/plan.py,
    // most_tokens) all of them are running or will be, whoever holds the SMs now.
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
    atomicAdd(p.arrived, 1u);
    u32 seen;
    do {
      asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(seen) : "l"(p.arrived) : "memory");
    } while ((seen & 0xffff) < static_cast<u32>(p.sorters));
  }
  __syncthreads();
}

// The first pair of the list in which a part is.
__device__ __forceinline__ u64 list_begin(const PrefillRouteParams& p, const Lists& lists,
                                          int part) {
  return static_cast<u64>(part / lists.parts) * lists.parts * p.part_pairs;
}

// For prefill_down.cu; prefill_sort_own.cuh has the other one.
__device__ void sort_part(const PrefillRouteParams& p, int part, int* counts, WarpSums& sums,
                          int* first) {
  const int tid = threadIdx.x, begin = part * p.part_pairs;
  const int end = min(begin + p.part_pairs, p.pairs);
  int mine[kMine];  // the expert, and its pair's rank times kMaxExperts: registers are few
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int pair = begin + i * kThreads + tid;
    mine[i] = pair < end ? expert_of(p, pair) : -1;
  }
  counts[tid] = 0;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    if (mine[i] >= 0) mine[i] += atomicAdd(&counts[mine[i]], 1) * kMaxExperts;
  }
  __syncthreads();
  __stcg(p.counts + part * kMaxExperts + tid, static_cast<u32>(counts[tid]));
  exchange_counts(p);
  const Begin begins = place_part(p, p.up, part, sums);
  first[tid] = begins.mine;
  __syncthreads();
  counts[tid] = begins.all;
  __syncthreads();
  const u64 list = list_begin(p, p.up, part);
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int pair = begin + i * kThreads + tid;
    if (pair >= end) continue;
    int row = -1;
    u32 column = 0;
    if (mine[i] >= 0) {
      const int e = mine[i] & (kMaxExperts - 1);
      row = first[e] + mine[i] / kMaxExperts;
      p.up.columns[list + row] = pair;
      column = ((row - counts[e]) & 7) | e << 3;  // tiles have multiples of 8
    }
    __stcg(reinterpret_cast<u64*>(p.sorted.place + pair),
           static_cast<u32>(row) | static_cast<u64>(column) << 32);
  }
  __syncthreads();
  if (tid == 0) {
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
    atomicAdd(p.arrived, 1u << 16);
  }
}
