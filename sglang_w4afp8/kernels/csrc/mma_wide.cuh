// wgmma of 48 … 192 tokens: what mma.cuh has for narrow tiles, by macros, as an instruction's operands
// cannot be counted at compile time.
#pragma once
#include "mma.cuh"

// The accumulators' registers: their numbers in the instruction's text, and what they stand for.
#define W4_TEXT_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define W4_TEXT_16 W4_TEXT_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define W4_TEXT_24 W4_TEXT_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define W4_TEXT_32 W4_TEXT_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define W4_TEXT_40 W4_TEXT_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define W4_TEXT_48 W4_TEXT_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define W4_TEXT_56 W4_TEXT_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define W4_TEXT_64 W4_TEXT_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define W4_TEXT_72 W4_TEXT_64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define W4_TEXT_80 W4_TEXT_72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define W4_TEXT_88 W4_TEXT_80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define W4_TEXT_96 W4_TEXT_88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define W4_FOUR(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define W4_SUMS_8 W4_FOUR(0), W4_FOUR(4)
#define W4_SUMS_16 W4_SUMS_8, W4_FOUR(8), W4_FOUR(12)
#define W4_SUMS_24 W4_SUMS_16, W4_FOUR(16), W4_FOUR(20)
#define W4_SUMS_32 W4_SUMS_24, W4_FOUR(24), W4_FOUR(28)
#define W4_SUMS_40 W4_SUMS_32, W4_FOUR(32), W4_FOUR(36)
#define W4_SUMS_48 W4_SUMS_40, W4_FOUR(40), W4_FOUR(44)
#define W4_SUMS_56 W4_SUMS_48, W4_FOUR(48), W4_FOUR(52)
#define W4_SUMS_64 W4_SUMS_56, W4_FOUR(56), W4_FOUR(60)
#define W4_SUMS_72 W4_SUMS_64, W4_FOUR(64), W4_FOUR(68)
#define W4_SUMS_80 W4_SUMS_72, W4_FOUR(72), W4_FOUR(76)
#define W4_SUMS_88 W4_SUMS_80, W4_FOUR(80), W4_FOUR(84)
#define W4_SUMS_96 W4_SUMS_88, W4_FOUR(88), W4_FOUR(92)
#define W4_TEXT_52 W4_TEXT_48 ", %48, %49, %50, %51"
#define W4_SUMS_52 W4_SUMS_48, W4_FOUR(48)
#define W4_TEXT_60 W4_TEXT_56 ", %56, %57, %58, %59"
#define W4_SUMS_60 W4_SUMS_56, W4_FOUR(56)
#define W4_TEXT_68 W4_TEXT_64 ", %64, %65, %66, %67"
#define W4_SUMS_68 W4_SUMS_64, W4_FOUR(64)
#define W4_TEXT_76 W4_TEXT_72 ", %72, %73, %74, %75"
#define W4_SUMS_76 W4_SUMS_72, W4_FOUR(72)
#define W4_TEXT_84 W4_TEXT_80 ", %80, %81, %82, %83"
#define W4_SUMS_84 W4_SUMS_80, W4_FOUR(80)
#define W4_TEXT_92 W4_TEXT_88 ", %88, %89, %90, %91"
#define W4_SUMS_92 W4_SUMS_88, W4_FOUR(88)

// `kSums` = kN / 2 registers; the operands behind them follow by number.
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

W4_MMA(48, 24, 24, 25, 26, 27, 28, 29);
W4_MMA(80, 40, 40, 41, 42, 43, 44, 45);
W4_MMA(96, 48, 48, 49, 50, 51, 52, 53);
W4_MMA(104, 52, 52, 53, 54, 55, 56, 57);
W4_MMA(112, 56, 56, 57, 58, 59, 60, 61);
W4_MMA(120, 60, 60, 61, 62, 63, 64, 65);
W4_MMA(128, 64, 64, 65, 66, 67, 68, 69);
W4_MMA(136, 68, 68, 69, 70, 71, 72, 73);
W4_MMA(144, 72, 72, 73, 74, 75, 76, 77);
W4_MMA(152, 76, 76, 77, 78, 79, 80, 81);
W4_MMA(160, 80, 80, 81, 82, 83, 84, 85);
W4_MMA(168, 84, 84, 85, 86, 87, 88, 89);
W4_MMA(176, 88, 88, 89, 90, 91, 92, 93);
W4_MMA(184, 92, 92, 93, 94, 95, 96, 97);
W4_MMA(192, 96, 96, 97, 98, 99, 100, 101);
