// Of prefill_up.cu with per-token scales: what a tile's columns are scaled by; its rows of products
// to FP8, by their own amax, when all of them are there.
#pragma once
#include "prefill.cuh"
#include "units.cuh"

#ifndef W4_INNER
#define W4_INNER 0
#endif
constexpr int kInner = W4_INNER;  // columns of `inner`; 0 where scales are static

// In shared memory, of a warpgroup and an item: the pair of each column and the scale of its token.
struct Columns {
  u8* at;

  __device__ __forceinline__ int* pairs() const { return reinterpret_cast<int*>(at); }
  __device__ __forceinline__ float* scales() const {
    return reinterpret_cast<float*>(at + kTokens * 4);
  }
  __device__ __forceinline__ int pair(int c) const { return pairs()[c]; }
  __device__ __forceinline__ float scale(int c) const { return scales()[c]; }

  // A warpgroup; the caller waits for all of it. Scales are those of the tokens, times what codes
  // are decoded to.
  template <class Params>
  __device__ __forceinline__ void read(const Params& p, u64 first_column, int count) const {
    for (int c = threadIdx.x & 127; c < count; c += 128) {
      const int pair = p.columns[first_column + c];
      pairs()[c] = pair;
      scales()[c] = p.b_scale[pair / p.top_k] * 512.0f;
    }
  }
};

// Rows that a warp has in registers at once, 64 numbers of each lane in all: memory is far away,
// and whoever has the last part of a tile is waited for.
constexpr int kVectors = kInner > 0 ? (kInner + 127) / 128 : 1;  // float4 of a lane and row
constexpr int kHeld = 16;
constexpr int kRowsHeld = kVectors < 2 ? 8 : kHeld / kVectors;  // 0: a row is too wide

// All warpgroups of a CTA: whether theirs was the last of a tile's `blocks`. The count is zero
// again then.
__shared__ u32 last;
__device__ __forceinline__ bool last_block(u32* count, u32 blocks) {
  named_sync(1 + kWgs, kConsumers);
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(count, 1u) == blocks - 1;
    if (last) *count = 0;
    __threadfence();
  }
  named_sync(1 + kWgs, kConsumers);
  return last != 0;
}

// The same: rows of the `count` pairs of a tile, `row_of(c)` for `store(row, i, four)` and the
// codes of columns i .. i + 3.
template <int kRows, class Params, class Rows, class Store>
__device__ __forceinline__ void quantize_tile(const Params& p, const int* pairs, int count,
                                              Rows row_of, Store store) {
  constexpr int kWarps = kConsumers / 32;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  if constexpr (kRows == 0) {
    for (int c = warp; c < count; c += kWarps) {
      const int pair = pairs[c], row = row_of(c);
      const float scale = quantize_row(p.inner + static_cast<u64>(pair) * kInner, kInner,
                                       [&](int i, u32 four) { store(row, i, four); });
      if (lane == 0) p.q_row_scale[pair] = scale;
    }
  } else {
    for (int begin = warp * kRows; begin < count; begin += kWarps * kRows) {
      const int rows = min(kRows, count - begin);
      int pair_of = 0, row_here = 0;
      if (lane < rows) pair_of = pairs[begin + lane], row_here = row_of(begin + lane);
      float4 v[kRows][kVectors];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int pair = __shfl_sync(0xffffffffu, pair_of, r);
        const float* from = p.inner + static_cast<u64>(pair) * kInner;
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
          const int column = i * 128 + lane * 4;
          v[r][i] = r < rows && column < kInner
                        ? __ldcg(reinterpret_cast<const float4*>(from + column))
                        : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r >= rows) break;
        float amax = 0.0f;
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
          const float4 w = v[r][i];
          amax = fmaxf(amax, fmaxf(fmaxf(fabsf(w.x), fabsf(w.y)), fmaxf(fabsf(w.z), fabsf(w.w))));
        }
        for (int d = 16; d; d >>= 1) amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, d));
        const float scale = amax > 0.0f ? __fdiv_rn(amax, kFp8Max) : 1.0f;
        const Divisor by = Divisor::of(scale);
        const int row = __shfl_sync(0xffffffffu, row_here, r);
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
          const int column = i * 128 + lane * 4;
          const float4 w = v[r][i];
          if (column < kInner) {
            store(row, column, pack_e4m3(divide(w.x, by), divide(w.y, by)) |
                                   pack_e4m3(divide(w.z, by), divide(w.w, by)) << 16);
          }
        }
        const int pair = __shfl_sync(0xffffffffu, pair_of, r);
        if (lane == 0) p.q_row_scale[pair] = scale;
      }
    }
  }
}
