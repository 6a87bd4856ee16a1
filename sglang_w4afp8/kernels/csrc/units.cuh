// Work units whose K is cut over several CTAs, and the last warpgroup's duties.
#pragma once
#include "primitives.cuh"

struct Join {
  float* partial;       // (CTAs, 2, accumulators, 128)
  u32* ready;           // (CTAs, 2), zero between launches
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
  const float scale = row_scale(amax);
  for (int i = lane * 4; i < width; i += 128) {
    const float4 v = __ldcg(reinterpret_cast<const float4*>(row + i));
    store(i, pack_e4m3(__fdiv_rn(v.x, scale), __fdiv_rn(v.y, scale)) |
                 pack_e4m3(__fdiv_rn(v.z, scale), __fdiv_rn(v.w, scale)) << 16);
  }
  return scale;
}

// Counts this warpgroup in; true for the one that completes `target`, which resets the count.
__device__ __forceinline__ bool last_to_arrive(u32* count, u32 target, int group, u32* flag) {
  named_sync(1 + group, 128);
  if ((threadIdx.x & 127) == 0) {
    __threadfence();
    const u32 before = atomicAdd(count, 1u);
    if (before == target - 1) *count = 0;
    *flag = before == target - 1;
    __threadfence();
  }
  named_sync(1 + group, 128);
  return *flag != 0;
}

// A unit whose K several CTAs share is finished by the one that starts it, which has it at the end
// of its run; the others have theirs at the beginning and have long published when it asks. Nobody
// who publishes waits for anybody, so the CTAs need not all be resident.
//
// Returns true where acc is the whole sum, added in the order of K.
template <int kAcc>
__device__ bool join_parts(const Join& p, float (&acc)[kAcc], long long total, int ctas, int unit,
                           bool starts) {
  const int thread = threadIdx.x & 127, group = threadIdx.x >> 7;
  constexpr int kSlot = 2 * kAcc * 128;
  float* slot = p.partial + group * kAcc * 128 + thread;
  if (!starts) {
    float* mine = slot + static_cast<u64>(blockIdx.x) * kSlot;
#pragma unroll
    for (int i = 0; i < kAcc; ++i) __stcg(mine + i * 128, acc[i]);
    named_sync(1 + group, 128);
    if (thread == 0) {
      asm volatile("fence.acq_rel.gpu;" ::: "memory");
      asm volatile("st.relaxed.gpu.u32 [%0], 1;" ::"l"(p.ready + blockIdx.x * 2 + group)
                   : "memory");
    }
    return false;
  }
  const long long begin = static_cast<long long>(unit) * p.stages_per_unit;
  const int last = static_cast<int>(((begin + p.stages_per_unit) * ctas - 1) / total);
  const int first = blockIdx.x + 1;
  if (thread <= last - first) {
    u32* ready = p.ready + (first + thread) * 2 + group;
    u32 seen;
    do {
      asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(seen) : "l"(ready) : "memory");
    } while (seen == 0);
    *ready = 0;
  }
  named_sync(1 + group, 128);
  for (int cta = first; cta <= last; ++cta) {
    const float* from = slot + static_cast<u64>(cta) * kSlot;
#pragma unroll
    for (int i = 0; i < kAcc; ++i) acc[i] += __ldcg(from + i * 128);
  }
  return true;
}
