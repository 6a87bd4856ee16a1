// RS-wgmma for FP8 weights in registers and FP8 tokens in shared memory, and the INT4 decoding.
#pragma once
#include "primitives.cuh"

// ---- INT4 to E4M3 -------------------------------------------------------------------------------
// E4M3 bit patterns 0..15 are the numbers 0..15 times 2^-9, so a magnitude up to 7 is its own code;
// the factor 2^9 is taken back together with the activation scale. One word holds eight codes:
// byte j = |x_j| in bits 0-2, sign y_j in bit 3, |y_(j+1)&3| in bits 4-6, sign x_j in bit 7, where
// x are the bytes of the first register and y those of the second (hopper/layout.py).
// With kMinusEight a negative v is stored as the magnitude -v-1 and gets its 1 back here.
template <bool kMinusEight>
__device__ __forceinline__ void decode_int4(u32 word, u32& x, u32& y) {
  constexpr u32 kKeep = 0x87878787u;
  x = word & kKeep;
  y = __funnelshift_l(word, word, 4) & kKeep;
  if (kMinusEight) {
    x += (x >> 7) & 0x01010101u;
    y += (y >> 7) & 0x01010101u;
  }
}

// ---- wgmma --------------------------------------------------------------------------------------
__device__ __forceinline__ void mma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void mma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void mma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving reads or writes of registers that a running wgmma owns.
template <int n>
__device__ __forceinline__ void pin(float (&d)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Descriptor of a token operand without swizzle: 8 tokens x 16 bytes are 128 contiguous bytes, the
// next 16 bytes of K follow at once (leading offset 128), the next 8 tokens after `token8_stride`.
__device__ __forceinline__ u64 token_descriptor(u32 address, u32 token8_stride) {
  return static_cast<u64>((address & 0x3ffffu) >> 4) | (static_cast<u64>(128 >> 4) << 16) |
         (static_cast<u64>(token8_stride >> 4) << 32);
}

// d (64 x N, float) {+}= a (64 x 32 E4M3, registers) * b (32 x N E4M3, shared memory)
template <int kN>
struct Mma;

// The accumulators: numbers of their registers in an instruction's text, and what these stand for.
// By macros, as an instruction's operands cannot be counted at compile time.
#define W4_FOUR(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define W4_TEXT_4 "%0, %1, %2, %3"
#define W4_TEXT_8 W4_TEXT_4 ", %4, %5, %6, %7"
#define W4_TEXT_12 W4_TEXT_8 ", %8, %9, %10, %11"
#define W4_TEXT_16 W4_TEXT_12 ", %12, %13, %14, %15"
#define W4_TEXT_20 W4_TEXT_16 ", %16, %17, %18, %19"
#define W4_TEXT_24 W4_TEXT_20 ", %20, %21, %22, %23"
#define W4_TEXT_28 W4_TEXT_24 ", %24, %25, %26, %27"
#define W4_TEXT_32 W4_TEXT_28 ", %28, %29, %30, %31"
#define W4_TEXT_36 W4_TEXT_32 ", %32, %33, %34, %35"
#define W4_TEXT_40 W4_TEXT_36 ", %36, %37, %38, %39"
#define W4_TEXT_44 W4_TEXT_40 ", %40, %41, %42, %43"
#define W4_TEXT_48 W4_TEXT_44 ", %44, %45, %46, %47"
#define W4_TEXT_52 W4_TEXT_48 ", %48, %49, %50, %51"
#define W4_TEXT_56 W4_TEXT_52 ", %52, %53, %54, %55"
#define W4_TEXT_60 W4_TEXT_56 ", %56, %57, %58, %59"
#define W4_TEXT_64 W4_TEXT_60 ", %60, %61, %62, %63"
#define W4_TEXT_68 W4_TEXT_64 ", %64, %65, %66, %67"
#define W4_TEXT_72 W4_TEXT_68 ", %68, %69, %70, %71"
#define W4_TEXT_76 W4_TEXT_72 ", %72, %73, %74, %75"
#define W4_TEXT_80 W4_TEXT_76 ", %76, %77, %78, %79"
#define W4_TEXT_84 W4_TEXT_80 ", %80, %81, %82, %83"
#define W4_TEXT_88 W4_TEXT_84 ", %84, %85, %86, %87"
#define W4_TEXT_92 W4_TEXT_88 ", %88, %89, %90, %91"
#define W4_TEXT_96 W4_TEXT_92 ", %92, %93, %94, %95"
#define W4_SUMS_4 W4_FOUR(0)
#define W4_SUMS_8 W4_SUMS_4, W4_FOUR(4)
#define W4_SUMS_12 W4_SUMS_8, W4_FOUR(8)
#define W4_SUMS_16 W4_SUMS_12, W4_FOUR(12)
#define W4_SUMS_20 W4_SUMS_16, W4_FOUR(16)
#define W4_SUMS_24 W4_SUMS_20, W4_FOUR(20)
#define W4_SUMS_28 W4_SUMS_24, W4_FOUR(24)
#define W4_SUMS_32 W4_SUMS_28, W4_FOUR(28)
#define W4_SUMS_36 W4_SUMS_32, W4_FOUR(32)
#define W4_SUMS_40 W4_SUMS_36, W4_FOUR(36)
#define W4_SUMS_44 W4_SUMS_40, W4_FOUR(40)
#define W4_SUMS_48 W4_SUMS_44, W4_FOUR(44)
#define W4_SUMS_52 W4_SUMS_48, W4_FOUR(48)
#define W4_SUMS_56 W4_SUMS_52, W4_FOUR(52)
#define W4_SUMS_60 W4_SUMS_56, W4_FOUR(56)
#define W4_SUMS_64 W4_SUMS_60, W4_FOUR(60)
#define W4_SUMS_68 W4_SUMS_64, W4_FOUR(64)
#define W4_SUMS_72 W4_SUMS_68, W4_FOUR(68)
#define W4_SUMS_76 W4_SUMS_72, W4_FOUR(72)
#define W4_SUMS_80 W4_SUMS_76, W4_FOUR(76)
#define W4_SUMS_84 W4_SUMS_80, W4_FOUR(80)
#define W4_SUMS_88 W4_SUMS_84, W4_FOUR(84)
#define W4_SUMS_92 W4_SUMS_88, W4_FOUR(88)
#define W4_SUMS_96 W4_SUMS_92, W4_FOUR(92)

// `kSums`: kN / 2 registers. The numbers of the other operands follow.
#define W4_MMA(kN, kSums, kA0, kA1, kA2, kA3, kB, kOn)                                             \
  template <>                                                                                      \
  struct Mma<kN> {                                                                                 \
    static __device__ __forceinline__ void issue(float (&d)[kSums], u32 a0, u32 a1, u32 a2,        \
                                                 u32 a3, u64 b, int accumulate) {                  \
      asm volatile(                                                                                \
          "{\n.reg .pred p;\nsetp.ne.b32 p, %" #kOn ", 0;\n"                                       \
          "wgmma.mma_async.sync.aligned.m64n" #kN "k32.f32.e4m3.e4m3 {" W4_TEXT_##kSums "}, "      \
          "{%" #kA0 ", %" #kA1 ", %" #kA2 ", %" #kA3 "}, %" #kB ", p, 1, 1;\n}\n"                  \
          : W4_SUMS_##kSums                                                                        \
          : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(accumulate));                          \
    }                                                                                              \
  }

W4_MMA(8, 4, 4, 5, 6, 7, 8, 9);
W4_MMA(16, 8, 8, 9, 10, 11, 12, 13);
W4_MMA(24, 12, 12, 13, 14, 15, 16, 17);
W4_MMA(32, 16, 16, 17, 18, 19, 20, 21);
W4_MMA(40, 20, 20, 21, 22, 23, 24, 25);
W4_MMA(64, 32, 32, 33, 34, 35, 36, 37);
