// First kernel of the prefill path: the pairs sorted by expert, and x in FP8.
//
// Block i sorts the (token, k) pairs of list i, a run of tokens. The other blocks quantise four rows of
// x each. Pairs of an expert are in no particular
// order: a pair's result does not depend on its neighbours, and sums are taken in the order of k.
#include "primitives.cuh"

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxExperts = 512;
constexpr int kTokens = 128;  // most of a tile

struct Tile {
  int expert, first, count, unused;
};

struct PrefillRouteParams {
  const u16* x;          // (M, hidden) bfloat16
  const void* ids;       // (M, top_k) int32 or int64
  u8* xq;                // (M, hidden) E4M3
  float* x_scale;        // (M) what a column's result is multiplied by
  const float* a_scale;  // (1) static scale, or null: amax of the row / 448
  Tile* tiles;           // (lists, max_tiles)
  int* header;           // (lists) number of tiles
  int* columns;          // (lists, list_pairs)
  int* place;            // (pairs) a pair's place in its list, or -1
  u32* zeros;            // counters of the kernels that follow
  int tokens, pairs, hidden, experts, lists, list_pairs, max_tiles, zero_count, ids_are_64;
};

__device__ __forceinline__ int expert_of(const PrefillRouteParams& p, int pair) {
  const long long id = p.ids_are_64 ? static_cast<const long long*>(p.ids)[pair]
                                    : static_cast<const int*>(p.ids)[pair];
  return id >= 0 && id < p.experts ? static_cast<int>(id) : -1;
}

__device__ void sort_pairs(const PrefillRouteParams& p, int list, int* counts, int* sums) {
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31;
  const int begin = list * p.list_pairs, end = min(p.pairs, begin + p.list_pairs);
  int* columns = p.columns + begin;
  counts[tid] = 0;
  __syncthreads();
#pragma unroll 8
  for (int i = begin + tid; i < end; i += kThreads) {
    const int e = expert_of(p, i);
    if (e >= 0) atomicAdd(&counts[e], 1);
  }
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
  if (tid == kThreads - 1) p.header[list] = tile + tiles;
  Tile* out = p.tiles + static_cast<u64>(list) * p.max_tiles + tile;
  for (int i = 0; i < tiles; ++i) {
    out[i] = Tile{tid, first + i * size, min(size, tokens - i * size), 0};
  }
  counts[tid] = first;
  __syncthreads();
#pragma unroll 8
  for (int i = begin + tid; i < end; i += kThreads) {
    const int e = expert_of(p, i);
    const int at = e >= 0 ? atomicAdd(&counts[e], 1) : -1;
    if (at >= 0) columns[at] = i;
    p.place[i] = at;
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
  __shared__ int counts[kMaxExperts];
  __shared__ int sums[2 * kWarps];
  pdl_wait();
  pdl_trigger();
  const int block = blockIdx.x;
  if (block == 0) {
    for (int i = threadIdx.x; i < p.zero_count; i += kThreads) p.zeros[i] = 0;
  }
  if (block < p.lists) {
    sort_pairs(p, block, counts, sums);
  } else {
    quantize_rows(p, (block - p.lists) * kRows, reinterpret_cast<float*>(sums));
  }
}
