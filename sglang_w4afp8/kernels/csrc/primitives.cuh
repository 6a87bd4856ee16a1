// PTX that the Hopper kernels are made of: barriers, bulk copies, programmatic launch, conversions.
//
// No header is included, so that NVRTC compiles these files without a CUDA toolkit beside it.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// A value that the compiler keeps, and does not work out anew each time, which takes longer.
template <class T>
__device__ __forceinline__ T kept(T value) {
  if constexpr (sizeof(T) == 8) {
    asm volatile("" : "+l"(value));
  } else {
    asm volatile("" : "+r"(value));
  }
  return value;
}

constexpr float kFp8Max = 448.0f;  // largest finite E4M3 value

__device__ __forceinline__ u32 smem_address(const void* p) {
  return static_cast<u32>(__cvta_generic_to_shared(p));
}

// ---- programmatic dependent launch --------------------------------------------------------------
// wait: the preceding kernel has finished and its writes are visible.
// trigger: the following kernel may start; what it may read before its own wait is said where used.
__device__ __forceinline__ void pdl_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void pdl_trigger() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// ---- mbarrier -----------------------------------------------------------------------------------
// A warp arrives by its first lane, after a __syncwarp, which orders what the others have read and
// written before it. Racecheck cannot see that where ptxas knows the warp to be together and leaves
// the instruction out. With W4_EVERY_LANE=1 (SGLANG_W4AFP8_EVERY_LANE) every lane arrives for
// itself: a barrier that counts warps counts kLanes for each. The condition is written out wherever
// a warp arrives, as a function for it would change the code of what is served.
#ifndef W4_EVERY_LANE
#define W4_EVERY_LANE 0
#endif
constexpr bool kEveryLane = W4_EVERY_LANE != 0;
constexpr u32 kLanes = kEveryLane ? 32 : 1;

__device__ __forceinline__ void barrier_init(u32 bar, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void barrier_expect(u32 bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 bar, u32 count) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
// The same on behalf of all that the barrier waits for.
__device__ __forceinline__ void barrier_expect_all(u32 bar, u32 bytes, u32 arrivals) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(bytes)
               : "memory");
  barrier_arrive(bar, arrivals);
}
// The same barrier of CTA `rank` of the cluster, after reads: they are done when their values are
// there. To release writes to the cluster would be a fence of all memory for every arrival.
__device__ __forceinline__ void barrier_arrive_at(u32 bar, u32 rank) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}\n" ::"r"(bar),
      "r"(rank)
      : "memory");
}
// The same, and what this thread has written is seen by who waits there for the cluster.
__device__ __forceinline__ void barrier_release_at(u32 bar, u32 rank) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n}\n" ::"r"(bar),
      "r"(rank)
      : "memory");
}
// The same word of shared memory of CTA `rank` of the cluster.
__device__ __forceinline__ void store_at(u32 address, u32 value, u32 rank) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %2;\n"
      "st.shared::cluster.u32 [there], %1;\n}\n" ::"r"(address),
      "r"(value), "r"(rank)
      : "memory");
}
// All threads of the cluster that have not exited; whole warps.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}
__device__ __forceinline__ bool barrier_try(u32 bar, u32 parity) {
  u32 done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}\n"
      : "=r"(done)
      : "r"(bar), "r"(parity)
      : "memory");
  return done != 0;
}
__device__ __forceinline__ void barrier_wait(u32 bar, u32 parity) {
  while (!barrier_try(bar, parity)) {
  }
}
// Then sees what another CTA of the cluster has released.
__device__ __forceinline__ void barrier_wait_cluster(u32 bar, u32 parity) {
  u32 done;
  do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(done)
        : "r"(bar), "r"(parity)
        : "memory");
  } while (done == 0);
}
// Named barrier of one group of `threads` threads; 0 is __syncthreads'.
__device__ __forceinline__ void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Whether this is the one lane of a whole warp that is chosen, always the same one. The compiler
// knows that it is one, and makes no loop over lanes for what takes uniform registers.
__device__ __forceinline__ bool chosen() {
  u32 is;
  asm volatile(
      "{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}\n"
      : "=r"(is));
  return is != 0;
}

// ---- copies -------------------------------------------------------------------------------------
// Weights are read once per step and should not push activations out of L2.
__device__ __forceinline__ u64 evict_first_policy() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ void bulk_copy(u32 dst, const void* src, u32 bytes, u32 bar,
                                          u64 policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1], %2, [%3], %4;" ::"r"(dst),
      "l"(src), "r"(bytes), "r"(bar), "l"(policy)
      : "memory");
}
__device__ __forceinline__ void bulk_copy(u32 dst, const void* src, u32 bytes, u32 bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(dst),
      "l"(src), "r"(bytes), "r"(bar)
      : "memory");
}
// To the same place of all CTAs of a cluster, counted by the same barrier of each.
__device__ __forceinline__ void bulk_copy_to_all(u32 dst, const void* src, u32 bytes, u32 bar,
                                                 u32 ctas) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1], %2, [%3], %4;" ::"r"(dst),
      "l"(src), "r"(bytes), "r"(bar), "h"(static_cast<u16>((1u << ctas) - 1))
      : "memory");
}
__device__ __forceinline__ void async_copy16(u32 dst, const void* src) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst), "l"(src) : "memory");
}
__device__ __forceinline__ void async_copy4(u32 dst, const void* src) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(dst), "l"(src) : "memory");
}
__device__ __forceinline__ void async_copy_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void async_copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
// The barrier counts this thread in when all its asynchronous copies so far have arrived.
__device__ __forceinline__ void async_copy_arrive(u32 bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory");
}
// Ordinary writes to shared memory seen so far become visible to the matrix unit's own reads.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// The same for memory: what this thread has written there, or sees written, and bulk copies.
__device__ __forceinline__ void fence_async_proxy_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

__device__ __forceinline__ uint4 lds128(u32 address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
__device__ __forceinline__ void sts128(u32 address, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}
__device__ __forceinline__ uint2 lds64(u32 address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];"
               : "=r"(v.x), "=r"(v.y)
               : "r"(address)
               : "memory");
  return v;
}
__device__ __forceinline__ u32 lds32(u32 address) {
  u32 v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}

__device__ __forceinline__ void sts32(u32 address, u32 v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}

// ---- numbers ------------------------------------------------------------------------------------
__device__ __forceinline__ float bf16_low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float bf16_high(u32 pair) {
  return __uint_as_float(pair & 0xffff0000u);
}
__device__ __forceinline__ u32 pack_half(float low, float high) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ u32 add_halves(u32 a, u32 b) {
  u32 r;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
// a * b + c.
__device__ __forceinline__ u32 fma_halves(u32 a, u32 b, u32 c) {
  u32 v;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "r"(c));
  return v;
}
__device__ __forceinline__ float half_low(u32 pair) {
  float r;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.f32.f16 %0, low;\n}"
      : "=f"(r)
      : "r"(pair));
  return r;
}
__device__ __forceinline__ float half_high(u32 pair) { return half_low(pair >> 16); }
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
// Two values to E4M3, round to nearest even, saturating at 448; `low` in the low byte.
__device__ __forceinline__ u32 pack_e4m3(float low, float high) {
  u16 r;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
  return r;
}
// a / b as IEEE division rounds it, given 1 / b rounded to nearest: the remainder of a first
// quotient is exact, and one step with it rounds correctly (Markstein). 3 instructions, not 10.
__device__ __forceinline__ float divide(float a, float b, float inverse) {
  const float q = a * inverse;
  const float better = __fmaf_rn(__fmaf_rn(-q, b, a), inverse, q);
  return fabsf(q) < 1e30f ? better : q;  // an overflown quotient has no remainder
}
// What many numbers are divided by, in two instructions each: 1 / b with 48 bits, in two parts, for
// b from 2^-126 to 2^60. A quotient with few bits, which E4M3 may have to round to even, is exact.
// `low` is not zero or negative, so that an infinite quotient stays what it is.
struct Divisor {
  float high, low;
  __device__ __forceinline__ static Divisor of(float b) {
    const float high = __frcp_rz(b);
    return Divisor{high, fmaxf(__fmaf_rn(-high, b, 1.0f) * high, high * 0x1p-60f)};
  }
};
__device__ __forceinline__ float divide(float a, Divisor by) {
  return __fmaf_rn(a, by.high, a * by.low);
}
// Eight BF16 values over a scale, as E4M3. `by`: a Divisor, or the scale and its inverse.
template <class... By>
__device__ __forceinline__ uint2 quantize8(uint4 v, By... by) {
  const u32 w[4] = {v.x, v.y, v.z, v.w};
  u32 q[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    q[i] = pack_e4m3(divide(bf16_low(w[i]), by...), divide(bf16_high(w[i]), by...));
  }
  return make_uint2(q[0] | q[1] << 16, q[2] | q[3] << 16);
}
__device__ __forceinline__ float largest8(float amax, uint4 v) {
  const u32 w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    amax = fmaxf(amax, fmaxf(fabsf(bf16_low(w[i])), fabsf(bf16_high(w[i]))));
  }
  return amax;
}
// What a row with this amax is divided by. A normal number, so that a Divisor has it: rows of
// denormal numbers would otherwise be divided by zero, or by what has no finite reciprocal.
__device__ __forceinline__ float row_scale(float amax) {
  return amax > 0.0f ? fmaxf(__fdiv_rn(amax, kFp8Max), 0x1p-126f) : 1.0f;
}
__device__ __forceinline__ float silu_mul(float gate, float up) {
  return gate / (1.0f + __expf(-gate)) * up;
}
// For prefill, where every feature of every pair needs one: the quotient's last bit is lost in FP8,
// and IEEE division is thirty instructions.
__device__ __forceinline__ float silu_mul_fast(float gate, float up) {
  return __fdividef(gate, 1.0f + __expf(-gate)) * up;
}
