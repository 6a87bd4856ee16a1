// One stage of weights times one tile of tokens: what a consumer warpgroup does between barriers.
//
// A stage holds, for each of two warpgroups, kTiles row tiles of 64 rows by kK columns: INT4 in
// blocks of 64 rows x 64 columns (2 KB, 16 bytes per thread), and for each row tile and scale group
// 64 BF16 scales as pairs of rows (r, r + 8).
#pragma once
#include "mma.cuh"
#if W4_ROW_SCALES
#include "row_scales.cuh"
#endif

// kRestart: each row tile's sum is complete after the stage; else there is one row tile and its
// sum goes on from stage to stage.
template <int kK_, int kTiles_, int kTokens_, int kGroup_, bool kMinusEight_, bool kRestart_>
struct Shape {
  static constexpr int kK = kK_, kTiles = kTiles_, kTokens = kTokens_, kGroup = kGroup_;
  static constexpr bool kMinusEight = kMinusEight_, kRestart = kRestart_;
  static constexpr int kGroups = kK / kGroup;             // scale groups along K
  static constexpr int kAcc = kTokens / 2;                // accumulators per thread and row tile
  static constexpr int kTileBytes = kK * 32;              // INT4 of 64 rows
  static constexpr int kTileScaleBytes = kGroups * 128;   // BF16 scales of 64 rows
  static constexpr int kSteps = kGroup / 32;              // wgmmas per scale group
  static_assert(kK % 64 == 0 && kK % kGroup == 0, "");
  static_assert(kRestart || kTiles == 1, "");
};

// Starts the wgmmas of one scale group. `w` is this thread's place in the row tile's block 0.
template <class S>
__device__ __forceinline__ void start_group(float (&part)[S::kAcc], u32 w, u64 b, int group) {
  u32 a[S::kSteps * 4];
  if constexpr (S::kGroup >= 64) {
#pragma unroll
    for (int h = 0; h < S::kGroup / 64; ++h) {
      const uint4 v = lds128(w + (group * (S::kGroup / 64) + h) * 2048);
      decode_int4<S::kMinusEight>(v.x, a[8 * h + 0], a[8 * h + 1]);
      decode_int4<S::kMinusEight>(v.y, a[8 * h + 2], a[8 * h + 3]);
      decode_int4<S::kMinusEight>(v.z, a[8 * h + 4], a[8 * h + 5]);
      decode_int4<S::kMinusEight>(v.w, a[8 * h + 6], a[8 * h + 7]);
    }
  } else {
    const uint2 v = lds64(w + (group >> 1) * 2048 + (group & 1) * 8);
    decode_int4<S::kMinusEight>(v.x, a[0], a[1]);
    decode_int4<S::kMinusEight>(v.y, a[2], a[3]);
  }
  pin(part);
  mma_fence();
  // 32 columns of K are two core matrices, 256 bytes, 16 units of a descriptor's address.
#pragma unroll
  for (int j = 0; j < S::kSteps; ++j) {
    Mma<S::kTokens>::issue(part, a[4 * j], a[4 * j + 1], a[4 * j + 2], a[4 * j + 3],
                           b + (group * S::kSteps + j) * 16, j);
  }
  mma_commit();
}

// acc {+}= part * row scale: exact group scales on FP32 sums.
template <class S>
__device__ __forceinline__ void add_scaled(float (&acc)[S::kAcc], float (&part)[S::kAcc],
                                           u32 scales, bool first) {
  const float s0 = bf16_low(scales), s1 = bf16_high(scales);
#pragma unroll
  for (int i = 0; i < S::kAcc; i += 4) {
    if (first) {
      acc[i] = part[i] * s0, acc[i + 1] = part[i + 1] * s0;
      acc[i + 2] = part[i + 2] * s1, acc[i + 3] = part[i + 3] * s1;
    } else {
      acc[i] += part[i] * s0, acc[i + 1] += part[i + 1] * s0;
      acc[i + 2] += part[i + 2] * s1, acc[i + 3] += part[i + 3] * s1;
    }
  }
}

// One stage of one warpgroup. `w`: this thread's 16 bytes of block 0; `s`: this thread's scale pair
// of group 0; `b`: descriptor of the tokens of row tile 0, `b_step` further for each row tile.
// With kRestart `finish(tile, acc)` is called for each row tile. `t`: see row_scales.cuh.
template <class S, class Finish>
__device__ __forceinline__ void stage_math(float (&acc)[S::kAcc], u32 w, u32 s, u64 b,
                                           u32 b_step, Finish finish
#if W4_ROW_SCALES
                                           , u32 t
#endif
) {
  constexpr int kItems = S::kTiles * S::kGroups;
  // Two groups in flight hide the wgmma latency; 64 columns leave no registers for the second.
  constexpr bool kPairs = S::kTokens <= 32 && kItems > 1;
  auto begin = [&](float(&part)[S::kAcc], u32& scales, int item) {
    const int tile = item / S::kGroups;
    scales = lds32(s + tile * S::kTileScaleBytes + item % S::kGroups * 128);
    start_group<S>(part, w + tile * S::kTileBytes, b + tile * b_step, item % S::kGroups);
  };
  auto end = [&](float(&part)[S::kAcc], u32 scales, int item) {
    const int tile = item / S::kGroups, group = item % S::kGroups;
    pin(part);
#if W4_ROW_SCALES
    scale_tokens<S>(part, t, group);
#endif
    add_scaled<S>(acc, part, scales, S::kRestart && group == 0);
    if (S::kRestart && group == S::kGroups - 1) finish(tile, acc);
  };
  if constexpr (kPairs) {
#pragma unroll
    for (int item = 0; item < kItems; item += 2) {
      float even[S::kAcc], odd[S::kAcc];
      u32 even_scales, odd_scales;
      begin(even, even_scales, item);
      if (item + 1 < kItems) {
        begin(odd, odd_scales, item + 1);
        mma_wait<1>();
      } else {
        mma_wait<0>();
      }
      end(even, even_scales, item);
      if (item + 1 < kItems) {
        mma_wait<0>();
        end(odd, odd_scales, item + 1);
      }
    }
  } else {
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      float part[S::kAcc];
      u32 scales;
      begin(part, scales, item);
      mma_wait<0>();
      end(part, scales, item);
    }
  }
}
