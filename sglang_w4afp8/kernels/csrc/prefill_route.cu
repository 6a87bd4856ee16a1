// First kernel of the prefill path: the pairs sorted by expert, and x in FP8.
//
// A list is a run of tokens whose (token, k) pairs are sorted by expert; the matrix kernels may want
// lists of different lengths. The first blocks sort: each counts its part of the pairs, publishes the
// counts, waits for the others' and then knows where its pairs go in both kinds of list. The other
// blocks quantise four rows of x each. Pairs of an expert are in no particular order: a pair's result
// does not depend on its neighbours, and sums are taken in the order of k.
#include "primitives.cuh"

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxExperts = 512;
constexpr int kTokens = 128;  // most of a tile
constexpr int kMine = 8;      // pairs of a sorting thread
constexpr int kPart = kThreads * kMine;

struct Tile {
  int expert, first, count, unused;
};

struct Lists {
  Tile* tiles;   // (count, max_tiles)
  int* header;   // (count) number of tiles
  int* columns;  // (count, pairs)
  int count, parts, max_tiles;  // a list has `parts` parts of kPart pairs, the last may have fewer
  int together;                 // an expert's tiles are a multiple of it; a power of two
};

struct PrefillRouteParams {
  const u16* x;          // (M, hidden) bfloat16
  const void* ids;       // (M, top_k) int32 or int64
  u8* xq;                // (M, hidden) E4M3
  float* x_scale;        // (M) what a column's result is multiplied by
  const float* a_scale;  // (1) static scale, or null: amax of the row / 448
  Lists up, down;        // down.count is 0 where both kernels use the same lists
  u32* counts;           // (sorters, kMaxExperts)
  u32* arrived;          // sorters that have published, zero before; the next kernel makes it zero again
  int* place;            // (pairs) a pair's place in its list of down, or -1
  u32* zeros;            // counters of the kernels that follow
  int tokens, pairs, hidden, experts, zero_count, ids_are_64, sorters;
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
  // Tiles of equal size, in steps of 16 columns; the last may be left without tokens.
  const int least = (tokens + kTokens - 1) / kTokens;
  const int tiles = (least + lists.together - 1) & -lists.together;
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
      out[i] = Tile{tid, first + i * size, max(0, min(size, tokens - i * size)), 0};
    }
  }
  return first + before;
}

__device__ void sort_part(const PrefillRouteParams& p, int part, int* counts, int* sums,
                          int* up_first, int* down_first) {
  const int tid = threadIdx.x, begin = part * kPart;
  int expert[kMine], rank[kMine];
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int pair = begin + i * kThreads + tid;
    expert[i] = pair < p.pairs ? expert_of(p, pair) : -1;
  }
  counts[tid] = 0;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kMine; ++i) rank[i] = expert[i] >= 0 ? atomicAdd(&counts[expert[i]], 1) : 0;
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
  __syncthreads();
  int* up = p.up.columns + part / p.up.parts * p.up.parts * kPart;
  int* down = several ? p.down.columns + part / p.down.parts * p.down.parts * kPart : nullptr;
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int pair = begin + i * kThreads + tid, e = expert[i];
    if (pair >= p.pairs) continue;
    int at = -1;
    if (e >= 0) {
      at = up_first[e] + rank[i];
      up[at] = pair;
      if (several) at = down_first[e] + rank[i], down[at] = pair;
    }
    p.place[pair] = at;
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
