// First kernel of the prefill path: the pairs sorted by expert, and x in FP8.
//
// A list is a run of tokens whose (token, k) pairs are sorted by expert, by one block. The matrix
// kernels may want lists of different lengths. The other blocks quantise four rows of x each. Pairs of an expert are in no particular
// order: a pair's result does not depend on its neighbours, and sums are taken in the order of k.
#include "primitives.cuh"

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxExperts = 512;
constexpr int kTokens = 128;  // most of a tile

struct Tile {
  int expert, first, count, unused;
};

struct Lists {
  Tile* tiles;   // (count, max_tiles)
  int* header;   // (count) number of tiles
  int* columns;  // (count, pairs)
  int count, pairs, max_tiles;
};

struct PrefillRouteParams {
  const u16* x;          // (M, hidden) bfloat16
  const void* ids;       // (M, top_k) int32 or int64
  u8* xq;                // (M, hidden) E4M3
  float* x_scale;        // (M) what a column's result is multiplied by
  const float* a_scale;  // (1) static scale, or null: amax of the row / 448
  Lists up, down;        // down.count is 0 where both kernels use the same lists
  int* place;            // (pairs) a pair's place in its list of down, or -1
  u32* zeros;            // counters of the kernels that follow
  int tokens, pairs, hidden, experts, zero_count, ids_are_64;
};

__device__ __forceinline__ int expert_of(const PrefillRouteParams& p, int pair) {
  const long long id = p.ids_are_64 ? static_cast<const long long*>(p.ids)[pair]
                                    : static_cast<const int*>(p.ids)[pair];
  return id >= 0 && id < p.experts ? static_cast<int>(id) : -1;
}

constexpr int kAtOnce = 8;  // ids that a thread loads before it looks at them

// Calls body(pair, expert) for each pair of this thread.
template <class Body>
__device__ __forceinline__ void each_pair(const PrefillRouteParams& p, int begin, int end,
                                          Body body) {
  for (int first = begin + threadIdx.x; first < end; first += kAtOnce * kThreads) {
    int expert[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int pair = first + i * kThreads;
      expert[i] = pair < end ? expert_of(p, pair) : -1;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i * kThreads < end) body(first + i * kThreads, expert[i]);
    }
  }
}

__device__ void sort_pairs(const PrefillRouteParams& p, const Lists& lists, int list, bool places,
                           int* counts, int* sums) {
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31;
  const int begin = list * lists.pairs, end = min(p.pairs, begin + lists.pairs);
  int* columns = lists.columns + begin;
  counts[tid] = 0;
  __syncthreads();
  each_pair(p, begin, end, [&](int, int expert) {
    if (expert >= 0) atomicAdd(&counts[expert], 1);
  });
  __syncthreads();
  // Thread e: expert e's tokens in equal tiles, in steps of 16 columns.
  const int tokens = counts[tid];
  const int tiles = (tokens + kTokens - 1) / kTokens;
  const int size = tiles > 0 ? ((tokens + tiles - 1) / tiles + 15) / 16 * 16 : 0;
  int pair_sum = tokens, tile_sum = tiles;
  for (int d = 1; d < 32; d <<= 1) {
    const int a = __shfl_up_sync(0xffffffffu, pair_sum, d);
    const int b = __shfl_up_sync(0xffffffffu, tile_sum, d);
    if (lane >= d) pair_sum += a, tile_sum += b;
  }
  if (lane == 31) sums[warp] = pair_sum, sums[kWarps + warp] = tile_sum;
  __syncthreads();
  int first = pair_sum - tokens, tile = tile_sum - tiles;
  for (int w = 0; w < warp; ++w) first += sums[w], tile += sums[kWarps + w];
  if (tid == kThreads - 1) lists.header[list] = tile + tiles;
  Tile* out = lists.tiles + static_cast<u64>(list) * lists.max_tiles + tile;
  for (int i = 0; i < tiles; ++i) {
    out[i] = Tile{tid, first + i * size, min(size, tokens - i * size), 0};
  }
  counts[tid] = first;
  __syncthreads();
  each_pair(p, begin, end, [&](int pair, int expert) {
    const int at = expert >= 0 ? atomicAdd(&counts[expert], 1) : -1;
    if (at >= 0) columns[at] = pair;
    if (places) p.place[pair] = at;
  });
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
  __shared__ int counts[kMaxExperts];
  __shared__ int sums[2 * kWarps];
  pdl_wait();
  pdl_trigger();
  const int block = blockIdx.x;
  if (block == 0) {
    for (int i = threadIdx.x; i < p.zero_count; i += kThreads) p.zeros[i] = 0;
  }
  const int sorts = p.up.count + p.down.count;
  if (block < p.up.count) {
    sort_pairs(p, p.up, block, p.down.count == 0, counts, sums);
  } else if (block < sorts) {
    sort_pairs(p, p.down, block - p.up.count, true, counts, sums);
  } else {
    quantize_rows(p, (block - sorts) * kRows, reinterpret_cast<float*>(sums));
  }
}
