// First kernel of the prefill path: the pairs sorted by expert, and x in FP8.
//
// Block 0 sorts all (token, k) pairs; with several lists block 1 + i sorts those of the i-th run of
// tokens. The other blocks quantise one row of x each. Pairs of an expert are in no particular
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
  Tile* tiles;           // (sorts, max_tiles)
  int* header;           // (sorts) number of tiles
  int* columns;          // all pairs; with several lists, then those of each list
  int* place;            // (pairs) a pair's place in its list, or -1
  u32* zeros;            // counters of the kernels that follow
  int pairs, top_k, hidden, experts, lists, list_pairs, max_tiles, zero_count, ids_are_64;
};

__device__ __forceinline__ int expert_of(const PrefillRouteParams& p, int pair) {
  const long long id = p.ids_are_64 ? static_cast<const long long*>(p.ids)[pair]
                                    : static_cast<const int*>(p.ids)[pair];
  return id >= 0 && id < p.experts ? static_cast<int>(id) : -1;
}

// `sort` 0: all pairs; 1 + i: list i. The list whose places the sums look up writes them.
__device__ void sort_pairs(const PrefillRouteParams& p, int sort, int* counts, int* sums) {
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31;
  const int begin = sort == 0 ? 0 : (sort - 1) * p.list_pairs;
  const int end = sort == 0 ? p.pairs : min(p.pairs, begin + p.list_pairs);
  int* columns = p.columns + (sort == 0 ? 0 : p.pairs + begin);
  const bool places = sort > 0 || p.lists == 1;
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
  if (tid == kThreads - 1) p.header[sort] = tile + tiles;
  Tile* out = p.tiles + static_cast<u64>(sort) * p.max_tiles + tile;
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
    if (places) p.place[i] = at;
  }
}

__device__ void quantize_row(const PrefillRouteParams& p, int token, float* amaxes) {
  const int tid = threadIdx.x;
  const u16* row = p.x + static_cast<u64>(token) * p.hidden;
  float scale;
  if (p.a_scale != nullptr) {
    scale = *p.a_scale;
  } else {
    float amax = 0.0f;
    for (int k = tid * 8; k < p.hidden; k += kThreads * 8) {
      amax = largest8(amax, *reinterpret_cast<const uint4*>(row + k));
    }
    for (int d = 16; d; d >>= 1) amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, d));
    if ((tid & 31) == 0) amaxes[tid >> 5] = amax;
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) amax = fmaxf(amax, amaxes[w]);
    scale = amax > 0.0f ? __fdiv_rn(amax, kFp8Max) : 1.0f;
  }
  if (tid == 0) p.x_scale[token] = scale;
  u8* out = p.xq + static_cast<u64>(token) * p.hidden;
  const float inverse = __frcp_rn(scale);
#pragma unroll 2
  for (int k = tid * 8; k < p.hidden; k += kThreads * 8) {
    *reinterpret_cast<uint2*>(out + k) =
        quantize8(*reinterpret_cast<const uint4*>(row + k), scale, inverse);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads)
    w4a8_prefill_route(const __grid_constant__ PrefillRouteParams p) {
  __shared__ int counts[kMaxExperts];
  __shared__ int sums[2 * kWarps];
  pdl_wait();
  pdl_trigger();
  const int sorts = p.lists > 1 ? 1 + p.lists : 1;
  const int block = blockIdx.x;
  if (block == 0) {
    for (int i = threadIdx.x; i < p.zero_count; i += kThreads) p.zeros[i] = 0;
  }
  if (block < sorts) {
    sort_pairs(p, block, counts, sums);
  } else {
    quantize_row(p, block - sorts, reinterpret_cast<float*>(sums));
  }
}
