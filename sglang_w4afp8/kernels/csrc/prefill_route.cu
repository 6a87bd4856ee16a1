// First kernel of the prefill path: the pairs sorted by expert, and x in FP8.
//
// A list is a run of tokens whose (token, k) pairs are sorted by expert; the matrix kernels may want
// lists of different lengths. The first blocks sort: each counts its part of the pairs, publishes the
// counts, waits for the others' and then knows where its pairs go in both kinds of list. The other
// blocks quantise four rows of x each. Pairs of an expert are in no particular order: a pair's result
// does not depend on its neighbours, and sums are taken in the order of k.
//
// For prefill_own_down.cu every part is a list of its own. Its sums are taken in the order of experts, so
// pairs keep their order where a token names an expert twice.
#include "primitives.cuh"

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxExperts = 512;
constexpr int kTokens = 128;  // most of a tile
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
  int count, parts, max_tiles;  // a list has `parts` parts of part_pairs pairs, the last may have fewer
};

// A pair in its list of prefill_own_down.cu.
struct Column {
  int pair;
  float weight;
};

struct OwnLists {
  Column* columns;       // (parts, part_pairs), or null: no such lists
  int* first;            // (parts, kMaxExperts + 1) where an expert's columns begin
  int* twice;            // (parts) whether a token may name an expert twice
  const float* weights;  // (M, top_k)
  int top_k;
};

struct PrefillRouteParams {
  const u16* x;          // (M, hidden) bfloat16
  const void* ids;       // (M, top_k) int32 or int64
  u8* xq;                // (M, hidden) E4M3
  float* x_scale;        // (M) what a column's result is multiplied by
  const float* a_scale;  // (1) static scale, or null: amax of the row / 448
  Lists up, down;        // down.count is 0 where both kernels use the same lists, or own is used
  OwnLists own;
  u32* counts;           // (sorters, kMaxExperts)
  u32* arrived;          // sorters that have published, zero before; the next kernel makes it zero again
  int* place;            // (pairs) a pair's place in its list of down, or -1
  u32* zeros;            // counters of the kernels that follow
  int tokens, pairs, hidden, experts, zero_count, ids_are_64, sorters, part_pairs;
};

__device__ __forceinline__ int expert_of(const PrefillRouteParams& p, int pair) {
  const long long id = p.ids_are_64 ? static_cast<const long long*>(p.ids)[pair]
                                    : static_cast<const int*>(p.ids)[pair];
  return id >= 0 && id < p.experts ? static_cast<int>(id) : -1;
}

// Thread e of the block of part `part`: where expert e's pairs of this part begin in its list. The
// first part of a list also writes its tiles.
__device__ int place_part(const PrefillRouteParams& p, const Lists& lists, int part, int* sums) {
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
  // Tiles of equal size, in steps of 16 columns.
  const int tiles = (tokens + kTokens - 1) / kTokens;
  const int size = tiles > 0 ? ((tokens + tiles - 1) / tiles + 15) / 16 * 16 : 0;
  int pair_sum = tokens, tile_sum = tiles;
  for (int d = 1; d < 32; d <<= 1) {
    const int a = __shfl_up_sync(0xffffffffu, pair_sum, d);
    const int b = __shfl_up_sync(0xffffffffu, tile_sum, d);
    if (lane >= d) pair_sum += a, tile_sum += b;
  }
  __syncthreads();
  if (lane == 31) sums[warp] = pair_sum, sums[kWarps + warp] = tile_sum;
  __syncthreads();
  int first = pair_sum - tokens, tile = tile_sum - tiles;
  for (int w = 0; w < warp; ++w) first += sums[w], tile += sums[kWarps + w];
  if (part == first_part) {
    if (tid == kThreads - 1) lists.header[list] = tile + tiles;
    Tile* out = lists.tiles + static_cast<u64>(list) * lists.max_tiles + tile;
    for (int i = 0; i < tiles; ++i) {
      out[i] = Tile{tid, first + i * size, min(size, tokens - i * size), 0};
    }
  }
  return first + before;
}

// The sum over the threads before this one, of kThreads values.
__device__ int sum_before(int value, int* sums) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  int sum = value;
  for (int d = 1; d < 32; d <<= 1) {
    const int other = __shfl_up_sync(0xffffffffu, sum, d);
    if (lane >= d) sum += other;
  }
  __syncthreads();
  if (lane == 31) sums[warp] = sum;
  __syncthreads();
  int before = sum - value;
  for (int w = 0; w < warp; ++w) before += sums[w];
  return before;
}

// Thread e of a part's block: where expert e's columns begin.
__device__ int place_own(const PrefillRouteParams& p, int part, int tokens, bool twice, int* sums) {
  const int first = sum_before(tokens, sums);
  int* out = p.own.first + static_cast<u64>(part) * (kMaxExperts + 1);
  out[threadIdx.x] = first;
  if (threadIdx.x == kThreads - 1) {
    out[kMaxExperts] = first + tokens;
    p.own.twice[part] = twice;
  }
  return first;
}

// Whether a token of the block's part names an expert twice; the same for all threads.
__device__ bool names_twice(const PrefillRouteParams& p, int begin, int end,
                            const int (&expert)[kMine]) {
  bool twice = false;
  for (int i = 0; i < kMine; ++i) {
    const int pair = begin + i * kThreads + static_cast<int>(threadIdx.x);
    if (pair >= end || expert[i] < 0) continue;
    for (int other = pair / p.own.top_k * p.own.top_k; other < pair; ++other) {
      twice |= expert_of(p, other) == expert[i];
    }
  }
  return __syncthreads_or(twice) != 0;
}

// Ranks in the order of pairs: a warp after the other, as this is rare.
__device__ void rank_in_order(const int (&expert)[kMine], int (&rank)[kMine], int* counts) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    for (int w = 0; w < kWarps; ++w) {
      if (w == warp) {
        const u32 same = __match_any_sync(0xffffffffu, expert[i]);
        const int e = max(expert[i], 0), before = counts[e];
        rank[i] = before + __popc(same & ((1u << lane) - 1));
        __syncwarp();
        if (expert[i] >= 0 && (same >> lane) == 1) counts[e] = rank[i] + 1;
      }
      __syncthreads();
    }
  }
}

__device__ void sort_part(const PrefillRouteParams& p, int part, int* counts, int* sums,
                          int* up_first, int* down_first) {
  const int tid = threadIdx.x, begin = part * p.part_pairs;
  const int end = min(begin + p.part_pairs, p.pairs);
  int expert[kMine], rank[kMine];
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int pair = begin + i * kThreads + tid;
    expert[i] = pair < end ? expert_of(p, pair) : -1;
  }
  counts[tid] = 0;
  __syncthreads();
  const bool own = p.own.columns != nullptr;
  bool twice = false;
  if (own) twice = names_twice(p, begin, end, expert);
  if (!twice) {
#pragma unroll
    for (int i = 0; i < kMine; ++i) rank[i] = expert[i] >= 0 ? atomicAdd(&counts[expert[i]], 1) : 0;
  } else {
    rank_in_order(expert, rank, counts);
  }
  __syncthreads();
  __stcg(p.counts + part * kMaxExperts + tid, static_cast<u32>(counts[tid]));
  __syncthreads();
  if (tid == 0) {
    // Blocks start in order and two fit on an SM: with no more sorters than that (hopper/plan.py,
    // most_tokens) all of them are running or will be, whoever holds the SMs now.
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
    atomicAdd(p.arrived, 1u);
    u32 seen;
    do {
      asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(seen) : "l"(p.arrived) : "memory");
    } while (seen < static_cast<u32>(p.sorters));
  }
  __syncthreads();
  const bool several = p.down.count > 0;
  up_first[tid] = place_part(p, p.up, part, sums);
  if (several) down_first[tid] = place_part(p, p.down, part, sums);
  if (own) down_first[tid] = place_own(p, part, counts[tid], twice, sums);
  __syncthreads();
  int* up = p.up.columns + part / p.up.parts * p.up.parts * p.part_pairs;
  int* down = several ? p.down.columns + part / p.down.parts * p.down.parts * p.part_pairs : nullptr;
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int pair = begin + i * kThreads + tid, e = expert[i];
    if (pair >= end) continue;
    int at = -1;
    if (e >= 0) {
      at = up_first[e] + rank[i];
      up[at] = pair;
      if (several) at = down_first[e] + rank[i], down[at] = pair;
      if (own) {
        p.own.columns[begin + down_first[e] + rank[i]] = Column{pair, p.own.weights[pair]};
      }
    }
    if (!own) p.place[pair] = at;
  }
}

// Four rows, 128 threads each.
constexpr int kRows = 4;
constexpr int kRowThreads = kThreads / kRows;

__device__ void quantize_rows(const PrefillRouteParams& p, int first, float* amaxes) {
  const int tid = threadIdx.x, token = first + tid / kRowThreads, at = tid % kRowThreads * 8;
  const bool here = token < p.tokens;
  const u16* row = p.x + static_cast<u64>(here ? token : 0) * p.hidden;
  float scale;
  if (p.a_scale != nullptr) {
    scale = *p.a_scale;
  } else {
    float amax = 0.0f;
#pragma unroll 4
    for (int k = at; k < p.hidden; k += kRowThreads * 8) {
      amax = largest8(amax, *reinterpret_cast<const uint4*>(row + k));
    }
    for (int d = 16; d; d >>= 1) amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, d));
    if ((tid & 31) == 0) amaxes[tid >> 5] = amax;
    __syncthreads();
    const int warps = kRowThreads / 32;
    for (int w = 0; w < warps; ++w) amax = fmaxf(amax, amaxes[tid / kRowThreads * warps + w]);
    scale = amax > 0.0f ? __fdiv_rn(amax, kFp8Max) : 1.0f;
  }
  if (!here) return;
  if (at == 0) p.x_scale[token] = scale;
  u8* out = p.xq + static_cast<u64>(token) * p.hidden;
  const float inverse = __frcp_rn(scale);
  constexpr int kTogether = 7;
  for (int k = at; k < p.hidden; k += kTogether * kRowThreads * 8) {
    uint4 v[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int column = k + i * kRowThreads * 8;
      if (column < p.hidden) v[i] = *reinterpret_cast<const uint4*>(row + column);
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int column = k + i * kRowThreads * 8;
      if (column < p.hidden) {
        *reinterpret_cast<uint2*>(out + column) = quantize8(v[i], scale, inverse);
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 2)
    w4a8_prefill_route(const __grid_constant__ PrefillRouteParams p) {
  __shared__ int counts[kMaxExperts], up_first[kMaxExperts], down_first[kMaxExperts];
  __shared__ int sums[2 * kWarps];
  pdl_wait();
  pdl_trigger();
  const int block = blockIdx.x;
  if (block == 0) {
    for (int i = threadIdx.x; i < p.zero_count; i += kThreads) p.zeros[i] = 0;
  }
  if (block < p.sorters) {
    sort_part(p, block, counts, sums, up_first, down_first);
  } else {
    quantize_rows(p, (block - p.sorters) * kRows, reinterpret_cast<float*>(sums));
  }
}
