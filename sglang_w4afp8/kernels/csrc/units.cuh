// Work units whose K is cut over several CTAs, and the last warpgroup's duties.
#pragma once
#include "primitives.cuh"

struct Join {
  float* partial;       // (2 * CTAs, 2, accumulators, 128)
  u32* unit_count;      // (units, 2), zero between launches
  int stages_per_unit;
};

// First item of CTA `cta` when `total` items are dealt out in equal contiguous runs.
__device__ __forceinline__ long long run_start(long long total, int cta, int ctas) {
  return total * cta / ctas;
}

// One warp: a row of FP32 values to E4M3 by its own amax. `store(i, four)` takes the codes of
// columns i .. i+3. Returns the scale, amax / 448, or 1 for a row of zeros.
template <class Store>
__device__ __forceinline__ float quantize_row(const float* row, int width, Store store) {
  const int lane = threadIdx.x & 31;
  float amax = 0.0f;
  for (int i = lane * 4; i < width; i += 128) {
    const float4 v = __ldcg(reinterpret_cast<const float4*>(row + i));
    amax = fmaxf(amax, fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w))));
  }
  for (int d = 16; d; d >>= 1) amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, d));
  const float scale = amax > 0.0f ? __fdiv_rn(amax, kFp8Max) : 1.0f;
  for (int i = lane * 4; i < width; i += 128) {
    const float4 v = __ldcg(reinterpret_cast<const float4*>(row + i));
    store(i, pack_e4m3(__fdiv_rn(v.x, scale), __fdiv_rn(v.y, scale)) |
                 pack_e4m3(__fdiv_rn(v.z, scale), __fdiv_rn(v.w, scale)) << 16);
  }
  return scale;
}

// Counts this warpgroup in; true for the one that completes `target`, which resets the count.
__device__ __forceinline__ bool last_to_arrive(u32* count, u32 target, int group, u32* flag) {
  __threadfence();
  named_sync(1 + group, 128);
  if ((threadIdx.x & 127) == 0) {
    const u32 before = atomicAdd(count, 1u);
    if (before == target - 1) *count = 0;
    *flag = before == target - 1;
  }
  named_sync(1 + group, 128);
  const bool last = *flag != 0;
  __threadfence();
  return last;
}

// Adds up a unit that several CTAs worked on, in the order of K. True where acc is complete.
template <int kAcc>
__device__ bool join_parts(const Join& p, float (&acc)[kAcc], long long total, int ctas, int unit,
                           bool starts, u32* flag) {
  const int thread = threadIdx.x & 127, group = threadIdx.x >> 7;
  constexpr int kSlot = 2 * kAcc * 128;
  const long long begin = static_cast<long long>(unit) * p.stages_per_unit;
  const int first = static_cast<int>(((begin + 1) * ctas - 1) / total);
  const int last = static_cast<int>(((begin + p.stages_per_unit) * ctas - 1) / total);
  float* mine = p.partial + (static_cast<u64>(blockIdx.x) * 2 + (starts ? 1 : 0)) * kSlot +
                group * kAcc * 128 + thread;
#pragma unroll
  for (int i = 0; i < kAcc; ++i) __stcg(mine + i * 128, acc[i]);
  if (!last_to_arrive(p.unit_count + unit * 2 + group, last - first + 1, group, flag)) return false;
#pragma unroll
  for (int i = 0; i < kAcc; ++i) acc[i] = 0.0f;
  for (int cta = first; cta <= last; ++cta) {
    const float* from = p.partial + (static_cast<u64>(cta) * 2 + (cta == first ? 1 : 0)) * kSlot +
                        group * kAcc * 128 + thread;
#pragma unroll
    for (int i = 0; i < kAcc; ++i) acc[i] += __ldcg(from + i * 128);
  }
  return true;
}
