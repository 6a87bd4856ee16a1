// First kernel of the prefill path: the pairs sorted by expert, and x in FP8, or the first rows of
// it.
//
// A list is a run of tokens whose (token, k) pairs are sorted by expert; the matrix kernels may
// want lists of different lengths. The first blocks sort: each counts its part of the pairs,
// publishes the counts, waits for the others' and then knows where its pairs go in both kinds of
// list. For prefill_down.cu pairs of an expert are in no particular order: a pair's result does not
// depend on its neighbours, and sums are taken in the order of k. For prefill_own_down.cu they are
// ordered by class (prefill_sort_own.cuh), and sums are taken in the order of experts, and then of
// columns: where a token names an expert twice, its columns depend on ids alone.
//
// For prefill_own_down.cu other blocks quantise four rows of x each, in the order of tokens.
//
// For prefill_down.cu (Sorted) the other blocks wait for those that sort, and then say whose rows
// are whose (describe_owners). A warp quantises a row of the list at a time, but only the first
// ones; prefill_up.cu writes the others (prefill_listed.cuh). With expert parallelism a token has
// about one pair here; where there are more pairs than room, all rows are quantised in the order of
// tokens. Tokens without a pair get their zeros from prefill_up.cu.
//
// Another E blocks find the largest scale of each expert's w2, from which prefill_own_down.cu knows
// how large sums can become.
//
// W4_ROW_SCALES=1: x came in E4M3 with a scale for each 128 columns, so rows are copied, not
// quantised, and where there is no room for them prefill_up.cu reads them where they are.
#include "prefill_sort_own.cuh"

#ifndef W4_ROW_SCALES
#define W4_ROW_SCALES 0
#endif
constexpr bool kRowScales = W4_ROW_SCALES != 0;

// A block: waits until all pairs have been placed. Blocks start in order, so those that sort run.
__device__ void wait_placed(const PrefillRouteParams& p) {
  if (threadIdx.x == 0) {
    u32 seen;
    for (;;) {
      asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(seen) : "l"(p.arrived) : "memory");
      if (seen >> 16 >= static_cast<u32>(p.sorters)) break;
      __nanosleep(100);
    }
  }
  __syncthreads();
}

// One warp, a lane for every pair of some tokens: what prefill_down.cu needs to know of their rows.
// `width` lanes a token, a power of two.
__device__ void describe_owners(const PrefillRouteParams& p, int first, int width) {
  const int lane = threadIdx.x & 31, k = lane & (width - 1), begin = lane - k;
  const int token = first + lane / width, pair = token * p.sorted.top_k + k;
  const bool here = token < p.tokens && k < p.sorted.top_k;
  const int row = here ? load_place(p.sorted.place, pair).row : -1;
  const u32 ours = __ballot_sync(0xffffffffu, row >= 0) >> begin & (0xffffffffu >> (32 - width));
  int last = row;
  for (int d = width >> 1; d; d >>= 1) last = max(last, __shfl_xor_sync(0xffffffffu, last, d));
  if (here && k == 0) p.sorted.empty[token] = ours == 0;
  const int count = __popc(ours);
  const u32 several = __ballot_sync(0xffffffffu, row >= 0 && count > 1);
  int slot = 0;
  if (lane == 0 && several != 0) slot = atomicAdd(p.sorted.slots, __popc(several));
  slot = __shfl_sync(0xffffffffu, slot, 0) + __popc(several & ((1u << lane) - 1));
  if (row < 0) return;
  const float weight = p.sorted.weights[pair];
  if (count == 1) {
    p.sorted.owners[row] = Owner{token, pair, __float_as_uint(weight), -1};
    return;
  }
  const int before = __popc(ours & ((1u << k) - 1));
  const u32 parts = row == last ? count : 0;
  p.sorted.owners[row] = Owner{token, pair, parts, slot};
  const u64 to = static_cast<u64>(last) * p.sorted.most_parts + before;
  p.sorted.parts[to] = Part{slot, weight};
}

// Four rows, 128 threads each.
constexpr int kRows = 4;
constexpr int kRowThreads = kThreads / kRows;

__device__ void quantize_rows(const PrefillRouteParams& p, int first, float* amaxes) {
  const int tid = threadIdx.x, token = first + tid / kRowThreads, at = tid % kRowThreads * 8;
  const bool here = token < p.tokens;
  const u64 begins = static_cast<u64>(here ? token : 0) * p.hidden;
  const u16* row = p.x + begins;
  u8* out = p.xq + begins;
  float scale;
  if (p.a_scale != nullptr) {
    scale = *p.a_scale;
  } else {
    float amax = 0.0f;
    if (here) {
#pragma unroll 4
      for (int k = at; k < p.hidden; k += kRowThreads * 8) {
        amax = largest8(amax, *reinterpret_cast<const uint4*>(row + k));
      }
    }
    for (int d = 16; d; d >>= 1) amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, d));
    __syncthreads();  // those of other rows have been read
    if ((tid & 31) == 0) amaxes[tid >> 5] = amax;
    __syncthreads();
    const int warps = kRowThreads / 32;
    for (int w = 0; w < warps; ++w) amax = fmaxf(amax, amaxes[tid / kRowThreads * warps + w]);
    scale = row_scale(amax);
  }
  if (!here) return;
  if (at == 0) p.x_scale[token] = scale;
  const float inverse = __frcp_rn(scale);
  constexpr int kTogether = 7;
  for (int begin = 0; begin < p.hidden; begin += kTogether * kRowThreads * 8) {
    uint4 v[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int column = begin + at + i * kRowThreads * 8;
      if (column < p.hidden) v[i] = *reinterpret_cast<const uint4*>(row + column);
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int column = begin + at + i * kRowThreads * 8;
      if (column < p.hidden) {
        *reinterpret_cast<uint2*>(out + column) = quantize8(v[i], scale, inverse);
      }
    }
  }
}

// Block `worker` of `workers` behind those that sort: what prefill_down.cu needs, and rows of x: in
// the order of the list the first ones, if all have room, or all in the order of tokens.
__device__ void serve_list(const PrefillRouteParams& p, int worker, int workers, float* amaxes) {
  wait_placed(p);
  const int warp = worker * kWarps + (threadIdx.x >> 5), warps = workers * kWarps;
  const int total = __ldcg(p.sorted.total);
  if (total <= p.sorted.room) {
    const int rows = min(total, p.sorted.listed.early);
    for (int row = warp; row < rows; row += warps) {
      put_rows<kRowScales, 7>(p.sorted.listed, row, 1);
    }
  } else if (!kRowScales) {
    for (int first = worker * kRows; first < p.tokens; first += workers * kRows) {
      quantize_rows(p, first, amaxes);
    }
  }
  int width = 1;
  while (width < p.sorted.top_k) width <<= 1;
  const int together = 32 / width;
  for (int first = warp * together; first < p.tokens; first += warps * together) {
    describe_owners(p, first, width);
  }
}

__device__ void find_largest(const PrefillRouteParams& p, int expert, u32* warps) {
  const u16* scales = p.own.w2_scale + static_cast<u64>(expert) * p.own.expert_scales;
  const int tid = threadIdx.x;
  // Without signs the order of bits is that of numbers. 2^-100 at least: with less, the power of
  // two for results would have no room, and weights would have to make up for it (describe_jobs).
  u32 largest = 0x0d800000u;
  auto see = [&](u32 bits) {
    if (bits < 0x7f800000u) largest = max(largest, bits);
  };
#pragma unroll 4
  for (int i = tid * 8; i < p.own.expert_scales; i += kThreads * 8) {
    const uint4 v = *reinterpret_cast<const uint4*>(scales + i);
    const u32 w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) see(w[j] << 16 & 0x7fffffffu), see(w[j] & 0x7fff0000u);
  }
  largest = __reduce_max_sync(0xffffffffu, largest);
  if ((tid & 31) == 0) warps[tid >> 5] = largest;
  __syncthreads();
  if (tid == 0) {
    for (int w = 0; w < kWarps; ++w) largest = max(largest, warps[w]);
    p.own.largest[expert] = __uint_as_float(largest);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 2)
    w4a8_prefill_route(const __grid_constant__ PrefillRouteParams p) {
  __shared__ int counts[kMaxExperts], first[kMaxExperts];
  __shared__ WarpSums sums;
  extern __shared__ OwnTables tables[];
  pdl_wait();
  pdl_trigger();
  const int block = blockIdx.x;
  for (int i = block * kThreads + threadIdx.x; i < p.zero_count; i += gridDim.x * kThreads) {
    p.zeros[i] = 0;
  }
  const int quantizers = (p.tokens + kRows - 1) / kRows;
  if (block < p.sorters && p.own.columns != nullptr) {
    sort_own_part(p, block, *tables, sums, counts, first);
  } else if (block < p.sorters) {
    sort_part(p, block, counts, sums, first);
  } else if (p.own.columns == nullptr) {
    serve_list(p, block - p.sorters, gridDim.x - p.sorters, reinterpret_cast<float*>(&sums));
  } else if (block < p.sorters + quantizers) {
    quantize_rows(p, (block - p.sorters) * kRows, reinterpret_cast<float*>(&sums));
  } else {
    find_largest(p, block - p.sorters - quantizers, reinterpret_cast<u32*>(&sums));
  }
}
