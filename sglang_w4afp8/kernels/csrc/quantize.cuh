// A row of activations to FP8, for the kernels that do nothing else with it.
#pragma once
#include "primitives.cuh"

// One row of x to FP8, by all kThreads threads of a block. Params has x (rows, hidden) bfloat16, xq
// (rows, hidden), x_scale (rows), a_scale: (1) static scale, or null for amax of the row / 448.
// `amaxes`: a float for each warp, free again after a barrier.
template <int kThreads, class Params>
__device__ void quantize_token(const Params& p, int token, float* amaxes) {
  constexpr int kWarps = kThreads / 32;
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
    scale = row_scale(amax);
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
