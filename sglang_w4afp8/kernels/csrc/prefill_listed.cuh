// x in FP8 in the order of the list, for prefill_up.cu where prefill_down.cu follows: who writes
// which rows, and how one knows that they are there.
//
// Blocks of prefill_route.cu write the first rows, all that gate and up begin with. The others are
// written by two warps of every CTA of prefill_up.cu, in the order of the list and far ahead of
// those who multiply: memory has time while the matrix unit is busy.
#pragma once
#include "prefill_lists.cuh"
#include "primitives.cuh"

// Where a pair is in the list.
struct ListPlace {
  int row;     // -1: not this rank's
  u32 column;  // of its tile, modulo 8, and 8 times the expert
};

// Of rows that came in E4M3: a scale for each 128 columns, a span. In the order of the list an
// expert's rows begin at a multiple of 4, as bulk copies do: it has up to 4 more than in the list.
struct SpanScales {
  const float* from;  // of token t and span s: number t * of_token + s * of_span
  float* listed;      // (hidden / 128, rows)
  int of_token, of_span, rows;
};
// Where those of a row of the list are, of an expert whose rows begin `before` rows in front of it.
__device__ __forceinline__ int span_row(int row, int before, int expert) {
  return row + ((before - row) & 3) + expert * 4;
}

// Rows of x in the order of the list.
struct Listed {
  const u16* x;            // (M, hidden) bfloat16, or E4M3 with W4_ROW_SCALES
  SpanScales spans;        // of it then
  const float* a_scale;    // (1) static scale, or null: amax of the row / 448
  const int* columns;      // (pairs) of the list
  const ListPlace* place;  // (M, top_k)
  u8* xq;                  // (room / kBlockRows, hidden / panel, kBlockRows, panel), swizzled
  float* x_scale;          // (M) where scales are not static
  u32* claimed;            // units that are written beside the matrix unit; zero before
  u32* written;            // (room / kBlockRows) rows of a block that have been, of those behind
                           // `early`; zero before
  int hidden, panel, top_k;
  int early;               // rows that route writes, a multiple of kBlockRows
};

constexpr int kUnitRows = 4;      // claimed at once
constexpr int kRowColumns = 256;  // of a warp at once
static_assert(kBlockRows % kUnitRows == 0, "");

__device__ __forceinline__ ListPlace load_place(const ListPlace* place, int pair) {
  const u64 v = __ldcg(reinterpret_cast<const u64*>(place + pair));
  return ListPlace{static_cast<int>(v), static_cast<u32>(v >> 32)};
}

// A warp: rows first .. first + count - 1 of the list, at most 32. It has kTogether times 512 bytes
// under way.
template <int kTogether>
__device__ __forceinline__ void write_rows(const Listed& p, int first, int count) {
  const int lane = threadIdx.x & 31;
  int token_of = 0;
  u32 key_of = 0;
  if (lane < count) {
    const int pair = __ldcg(p.columns + first + lane);
    const u32 column = load_place(p.place, pair).column & 7;
    token_of = pair / p.top_k, key_of = (p.panel == 128 ? column : column >> 1) * 16;
  }
  // kRowColumns are kRowColumns / panel panels, kBlockRows rows of a panel each.
  constexpr int kStep = kRowColumns * kBlockRows;
  const int column = lane * 8, in_panel = column & (p.panel - 1);
  for (int r = 0; r < count; ++r) {
    const int token = __shfl_sync(0xffffffffu, token_of, r);
    const u32 key = __shfl_sync(0xffffffffu, key_of, r);
    const u16* from = p.x + static_cast<u64>(token) * p.hidden + column;
    const int row = first + r, block = row / kBlockRows;
    u8* to = p.xq + static_cast<u64>(block) * kBlockRows * p.hidden +
             (column - in_panel) * kBlockRows + row % kBlockRows * p.panel + (in_panel ^ key);
    float scale;
    if (p.a_scale != nullptr) {
      scale = *p.a_scale;
    } else {
      float amax = 0.0f;
#pragma unroll 4
      for (int c = column; c < p.hidden; c += kRowColumns) {
        amax = largest8(amax, *reinterpret_cast<const uint4*>(from + c - column));
      }
      for (int d = 16; d; d >>= 1) amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, d));
      scale = row_scale(amax);
      if (lane == 0) p.x_scale[token] = scale;  // the same for all of the token's pairs
    }
    const Divisor by = Divisor::of(scale);
#pragma unroll 1
    for (int left = p.hidden - column; left > 0; left -= kTogether * kRowColumns) {
      uint4 v[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (i * kRowColumns < left) v[i] = *reinterpret_cast<const uint4*>(from + i * kRowColumns);
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (i * kRowColumns < left) {
          *reinterpret_cast<uint2*>(to + i * kStep) = quantize8(v[i], by);
        }
      }
      from += kTogether * kRowColumns, to += kTogether * kStep;
    }
    __syncwarp();
  }
}

// The same where x came in E4M3, hidden a multiple of 128: codes and scales as they are.
template <int kTogether>
__device__ __forceinline__ void copy_rows(const Listed& p, int first, int count) {
  const int lane = threadIdx.x & 31;
  int token_of = 0, scale_of = 0;
  u32 key_of = 0;
  if (lane < count) {
    const int pair = __ldcg(p.columns + first + lane), row = first + lane;
    const ListPlace place = load_place(p.place, pair);
    const int number = place.column & 7, expert = place.column >> 3;
    token_of = pair / p.top_k, key_of = number * 16;
    scale_of = span_row(row, number, expert);
  }
  constexpr int kWarpColumns = 512, kStep = kWarpColumns * kBlockRows;
  const int column = lane * 16, in_panel = column & 127;
  for (int r = 0; r < count; ++r) {
    const int token = __shfl_sync(0xffffffffu, token_of, r), row = first + r;
    const u32 key = __shfl_sync(0xffffffffu, key_of, r);
    const int scale_row = __shfl_sync(0xffffffffu, scale_of, r);
    const u8* from =
        reinterpret_cast<const u8*>(p.x) + static_cast<u64>(token) * p.hidden + column;
    u8* to = p.xq + static_cast<u64>(row / kBlockRows) * kBlockRows * p.hidden +
             (column - in_panel) * kBlockRows + row % kBlockRows * 128 + (in_panel ^ key);
    const float* scales = p.spans.from + token * p.spans.of_token;
    for (int span = lane; span < p.hidden / 128; span += 32) {
      p.spans.listed[static_cast<u64>(span) * p.spans.rows + scale_row] =
          scales[span * p.spans.of_span];
    }
#pragma unroll 1
    for (int left = p.hidden - column; left > 0; left -= kTogether * kWarpColumns) {
      uint4 v[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (i * kWarpColumns < left) {
          v[i] = *reinterpret_cast<const uint4*>(from + i * kWarpColumns);
        }
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (i * kWarpColumns < left) *reinterpret_cast<uint4*>(to + i * kStep) = v[i];
      }
      from += kTogether * kWarpColumns, to += kTogether * kStep;
    }
    __syncwarp();
  }
}

// Whichever of them is wanted.
template <bool kCopied, int kTogether>
__device__ __forceinline__ void put_rows(const Listed& p, int first, int count) {
  if constexpr (kCopied) {
    copy_rows<kTogether>(p, first, count);
  } else {
    write_rows<kTogether>(p, first, count);
  }
}

// A warp: the next unit of `total` rows, until there are none, and `beside()` after each.
template <bool kCopied, class Beside>
__device__ __forceinline__ void write_listed(const Listed& p, int total, Beside beside) {
  const int lane = threadIdx.x & 31;
  auto claim = [&] { return lane == 0 ? atomicAdd(p.claimed, 1u) : 0; };
  for (u32 next = claim();;) {
    const int first = p.early + static_cast<int>(__shfl_sync(0xffffffffu, next, 0)) * kUnitRows;
    if (first >= total) return;
    next = claim();
    const int count = min(kUnitRows, total - first);
    put_rows<kCopied, 4>(p, first, count);
    fence_async_proxy_global();
    __syncwarp();
    if (lane == 0) {
      asm volatile("fence.acq_rel.gpu;" ::: "memory");
      asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(p.written + first / kBlockRows),
                   "r"(count)
                   : "memory");
    }
    beside();
  }
}

// A warp that copies rows of the list: waits until they are there.
struct Written {
  const Listed& p;
  int total, blocks;  // of which it knows

  __device__ __forceinline__ static Written of(const Listed& p, int total) {
    return Written{p, total, p.early / kBlockRows};
  }
  // Rows before `end`. Whoever writes them waits for nobody.
  __device__ __forceinline__ void wait(int end) {
    const int wanted = (end + kBlockRows - 1) / kBlockRows;
    if (blocks >= wanted) return;
    for (; blocks < wanted; blocks += 32) {
      const int block = blocks + (threadIdx.x & 31);
      const int rows = block < wanted ? min(kBlockRows, total - block * kBlockRows) : 0;
      u32 seen = 0;
      do {
        if (rows > 0) {
          asm volatile("ld.acquire.gpu.u32 %0, [%1];"
                       : "=r"(seen)
                       : "l"(p.written + block)
                       : "memory");
        }
      } while (!__all_sync(0xffffffffu, seen >= static_cast<u32>(rows)));
    }
    blocks = wanted;
    fence_async_proxy_global();
    __syncwarp();
  }
};
