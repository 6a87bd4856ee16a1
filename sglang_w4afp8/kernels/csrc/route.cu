// First kernel of the large-batch path: token lists of each expert, and x in FP8.
//
// Block 0 sorts the (token, k) pairs by expert, in pair order inside an expert, so that the result
// does not depend on timing; it cuts each expert's list into tiles of `tile_tokens` columns for the
// matrix kernels. The other blocks quantise one row of x each.
#include "primitives.cuh"

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxExperts = 512;

struct RouteParams {
  const u16* x;          // (M, hidden) bfloat16
  const void* ids;       // (M, top_k) int32 or int64
  u8* xq;                // (M, hidden) E4M3
  float* x_scale;        // (M) what a column's result is multiplied by
  const float* a_scale;  // (1) static scale, or null: amax of the row / 448
  int* header;           // [0] number of tiles
  int4* tiles;           // {expert, first place in sorted, tokens, 0}
  int* sorted;           // pair numbers t * top_k + k
  int pairs, hidden, experts, tile_tokens, ids_are_64;
};

__device__ __forceinline__ int expert_of(const RouteParams& p, int pair) {
  const long long id = p.ids_are_64 ? static_cast<const long long*>(p.ids)[pair]
                                    : static_cast<const int*>(p.ids)[pair];
  return id >= 0 && id < p.experts ? static_cast<int>(id) : -1;
}

__device__ void sort_pairs(const RouteParams& p) {
  __shared__ int counts[kWarps][kMaxExperts];
  __shared__ int sums[2][kWarps];
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31;
  for (int i = tid; i < kWarps * kMaxExperts; i += kThreads) (&counts[0][0])[i] = 0;
  __syncthreads();

  // Each warp walks its own contiguous run of pairs, so warp order is pair order.
  const int run = (p.pairs + kWarps - 1) / kWarps;
  const int begin = warp * run, end = min(p.pairs, begin + run);
  for (int base = begin; base < end; base += 32) {
    const int e = base + lane < end ? expert_of(p, base + lane) : -1;
    const u32 same = __match_any_sync(0xffffffffu, e);
    if (e >= 0 && lane == __ffs(same) - 1) counts[warp][e] += __popc(same);
    __syncwarp();
  }
  __syncthreads();

  // Thread e: places of expert e's pairs per warp, then sums over experts by two scans.
  int tokens = 0;
  for (int w = 0; w < kWarps; ++w) {
    const int n = counts[w][tid];
    counts[w][tid] = tokens;
    tokens += n;
  }
  const int tiles = (tokens + p.tile_tokens - 1) / p.tile_tokens;
  int token_sum = tokens, tile_sum = tiles;
  for (int d = 1; d < 32; d <<= 1) {
    const int a = __shfl_up_sync(0xffffffffu, token_sum, d);
    const int b = __shfl_up_sync(0xffffffffu, tile_sum, d);
    if (lane >= d) token_sum += a, tile_sum += b;
  }
  if (lane == 31) sums[0][warp] = token_sum, sums[1][warp] = tile_sum;
  __syncthreads();
  int first = token_sum - tokens, tile = tile_sum - tiles;
  for (int w = 0; w < warp; ++w) first += sums[0][w], tile += sums[1][w];
  if (tid == kThreads - 1) p.header[0] = tile + tiles;
  for (int i = 0; i < tiles; ++i) {
    const int at = i * p.tile_tokens;
    p.tiles[tile + i] = make_int4(tid, first + at, min(p.tile_tokens, tokens - at), 0);
  }
  for (int w = 0; w < kWarps; ++w) counts[w][tid] += first;
  __syncthreads();

  for (int base = begin; base < end; base += 32) {
    const int e = base + lane < end ? expert_of(p, base + lane) : -1;
    const u32 same = __match_any_sync(0xffffffffu, e);
    const int before = __popc(same & ((1u << lane) - 1));
    if (e >= 0) p.sorted[counts[warp][e] + before] = base + lane;
    __syncwarp();
    if (e >= 0 && before == 0) counts[warp][e] += __popc(same);
    __syncwarp();
  }
}

__device__ void quantize_row(const RouteParams& p, int token) {
  const int tid = threadIdx.x;
  const u16* row = p.x + static_cast<u64>(token) * p.hidden;
  float scale;
  if (p.a_scale != nullptr) {
    scale = *p.a_scale;
  } else {
    __shared__ float amaxes[kWarps];
    float amax = 0.0f;
    for (int k = tid * 8; k < p.hidden; k += kThreads * 8) {
      const uint4 v = *reinterpret_cast<const uint4*>(row + k);
      const u32 w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        amax = fmaxf(amax, fmaxf(fabsf(bf16_low(w[i])), fabsf(bf16_high(w[i]))));
      }
    }
    for (int d = 16; d; d >>= 1) amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, d));
    if ((tid & 31) == 0) amaxes[tid >> 5] = amax;
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) amax = fmaxf(amax, amaxes[w]);
    scale = amax > 0.0f ? __fdiv_rn(amax, kFp8Max) : 1.0f;
  }
  if (tid == 0) p.x_scale[token] = scale;
  u8* out = p.xq + static_cast<u64>(token) * p.hidden;
  for (int k = tid * 8; k < p.hidden; k += kThreads * 8) {
    const uint4 v = *reinterpret_cast<const uint4*>(row + k);
    const u32 w[4] = {v.x, v.y, v.z, v.w};
    u32 q[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      q[i] = pack_e4m3(__fdiv_rn(bf16_low(w[i]), scale), __fdiv_rn(bf16_high(w[i]), scale));
    }
    *reinterpret_cast<uint2*>(out + k) = make_uint2(q[0] | q[1] << 16, q[2] | q[3] << 16);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads)
    w4a8_route(const __grid_constant__ RouteParams p) {
  pdl_wait();
  pdl_trigger();
  if (blockIdx.x == 0) {
    sort_pairs(p);
  } else {
    quantize_row(p, blockIdx.x - 1);
  }
}
