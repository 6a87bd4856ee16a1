// Tokens that came in E4M3 with a scale per 128 columns (W4_ROW_SCALES=1).
//
// The scales travel with the stage, behind its tokens: (spans, tokens) float, a span being the 128
// columns of a scale or, where stages are no multiples of them, half of that.
#pragma once
#include "primitives.cuh"

template <class S>
struct RowScales {
  static constexpr int kSpan = S::kK % 128 == 0 ? 128 : 64;
  static constexpr int kSpans = S::kK / kSpan;
  static constexpr int kBytes = (kSpans * S::kTokens * 4 + 127) / 128 * 128;
  static constexpr int kRows = (S::kTokens + 31) / 32;  // tokens of a lane of the producer

  // Producer, once a tile: where the scales of this lane's tokens are, as numbers behind
  // `row_scale`, -1 for none. Lanes own tokens lane, lane + 32 or, of fewer, lane % kTokens.
  template <class Params>
  static __device__ __forceinline__ void find(const Params& p, int tile, int (&row)[kRows]) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const int pair = p.columns[tile * S::kTokens + (j * 32 + lane) % S::kTokens];
      const int r = pair / p.top_k;
      row[j] = pair < 0 ? -1 : r / p.slots * p.scale_expert + r % p.slots * p.scale_slot;
    }
  }

  // Producer, once a stage: asynchronous copies. `dst`: of the stage's scales.
  template <class Params>
  static __device__ __forceinline__ void copy(const Params& p, const int (&row)[kRows], int step,
                                              u32 dst) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < (kSpans * S::kTokens + 31) / 32; ++i) {
      const int span = (i * 32 + lane) / S::kTokens, from = row[i % kRows];
      if (span < kSpans && from >= 0) {
        const int column = (step * S::kK + span * kSpan) / 128;
        async_copy4(dst + (i * 32 + lane) * 4, p.row_scale + from + column * p.scale_span);
      }
    }
  }
};

// Consumer: the sum of one group of weights, times the tokens' scales there. `t`: this thread's
// first two columns of the stage's scales.
template <class S>
__device__ __forceinline__ void scale_tokens(float (&part)[S::kAcc], u32 t, int group) {
  t += group * S::kGroup / RowScales<S>::kSpan * S::kTokens * 4;
#pragma unroll
  for (int i = 0; i < S::kAcc; i += 4) {
    const uint2 v = lds64(t + i * 8);
    const float t0 = __uint_as_float(v.x), t1 = __uint_as_float(v.y);
    part[i] *= t0, part[i + 1] *= t1, part[i + 2] *= t0, part[i + 3] *= t1;
  }
}
