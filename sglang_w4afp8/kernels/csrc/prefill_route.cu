// First kernel of the prefill path: the pairs sorted by expert, and x in FP8.
//
// A list is a run of tokens whose (token, k) pairs are sorted by expert; the matrix kernels may
// want lists of different lengths. The first blocks sort: each counts its part of the pairs,
// publishes the counts, waits for the others' and then knows where its pairs go in both kinds of
// list. The other blocks quantise four rows of x each. For prefill_down.cu pairs of an expert are in
// no particular order: a pair's result does not depend on its neighbours, and sums are taken in the
// order of k. For prefill_own_down.cu they are ordered by class (prefill_sort_own.cuh), and sums are
// taken in the order of experts, and then of columns: where a token names an expert twice, its
// columns depend on ids alone.
//
// For prefill_down.cu (Sorted) the blocks that quantise wait for those that sort, and write a row
// to the place of each of its pairs: an expert's tokens are contiguous then, in the order in which
// shared memory has them. With expert parallelism a token has about one pair here; where there are
// more pairs than room, rows are left in the order of tokens. Tokens without a pair get their zeros
// from prefill_up.cu.
//
// Another E blocks find the largest scale of each expert's w2, from which prefill_own_down.cu knows
// how large sums can become.
#include "prefill_sort_own.cuh"

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

__device__ Place load_place(const PrefillRouteParams& p, int pair) {
  const u64 v = __ldcg(reinterpret_cast<const u64*>(p.sorted.place + pair));
  return Place{static_cast<int>(v), static_cast<u32>(v >> 32)};
}

// One warp, whose lane k has the place of pair k: what prefill_down.cu needs to know of the rows.
__device__ void describe_owners(const PrefillRouteParams& p, int token, Place place) {
  const int k = threadIdx.x & 31, pair = token * p.sorted.top_k + k;
  const u32 ours = __ballot_sync(0xffffffffu, place.row >= 0);
  const int last = __reduce_max_sync(0xffffffffu, place.row), count = __popc(ours);
  if (place.row < 0) return;
  const float weight = p.sorted.weights[pair];
  if (count == 1) {
    p.sorted.owners[place.row] = Owner{token, pair, __float_as_uint(weight), -1};
    return;
  }
  const int leader = __ffs(ours) - 1, before = __popc(ours & ((1u << k) - 1));
  int slot = 0;
  if (k == leader) slot = atomicAdd(p.sorted.slots, count);
  slot = __shfl_sync(ours, slot, leader) + before;
  const u32 parts = place.row == last ? count : 0;
  p.sorted.owners[place.row] = Owner{token, pair, parts, slot};
  const u64 to = static_cast<u64>(last) * p.sorted.most_parts + before;
  p.sorted.parts[to] = Part{slot, weight};
}

// Four rows, 128 threads each.
constexpr int kRows = 4;
constexpr int kRowThreads = kThreads / kRows;

__device__ void quantize_rows(const PrefillRouteParams& p, int first, float* amaxes) {
  const int tid = threadIdx.x, token = first + tid / kRowThreads, at = tid % kRowThreads * 8;
  const bool sorted = p.sorted.place != nullptr;
  bool here = token < p.tokens;
  const int k_lane = tid & 31, pair = token * p.sorted.top_k + k_lane;
  if (sorted && here) {
    const bool ours = k_lane < p.sorted.top_k && expert_of(p, pair) >= 0;
    here = __any_sync(0xffffffffu, ours);
    if (at == 0) p.sorted.empty[token] = !here;
  }
  const u16* row = p.x + static_cast<u64>(here ? token : 0) * p.hidden;
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
    if ((tid & 31) == 0) amaxes[tid >> 5] = amax;
    __syncthreads();
    const int warps = kRowThreads / 32;
    for (int w = 0; w < warps; ++w) amax = fmaxf(amax, amaxes[tid / kRowThreads * warps + w]);
    scale = amax > 0.0f ? __fdiv_rn(amax, kFp8Max) : 1.0f;
  }
  if (here && at == 0) p.x_scale[token] = scale;
  const float inverse = __frcp_rn(scale);
  constexpr int kTogether = 7;
  Place mine{-1, 0};  // lane k: of pair k
  bool in_order = false;
  for (int begin = 0; begin < p.hidden; begin += kTogether * kRowThreads * 8) {
    uint4 v[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int column = begin + at + i * kRowThreads * 8;
      if (here && column < p.hidden) v[i] = *reinterpret_cast<const uint4*>(row + column);
    }
    if (sorted && begin == 0) {
      wait_placed(p);  // for all warps of the block, whether they have a row or not
      if (here && k_lane < p.sorted.top_k) mine = load_place(p, pair);
      in_order = __ldcg(p.sorted.total) <= p.sorted.room;
    }
    if (!here) continue;
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const uint2 q = quantize8(v[i], scale, inverse);
      v[i].x = q.x, v[i].y = q.y;
    }
    auto store = [&](auto address) {
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int column = begin + at + i * kRowThreads * 8;
        if (column < p.hidden) {
          *reinterpret_cast<uint2*>(address(column)) = make_uint2(v[i].x, v[i].y);
        }
      }
    };
    if (!in_order) {
      u8* out = p.xq + static_cast<u64>(token) * p.hidden;
      store([&](int column) { return out + column; });
      continue;
    }
    const int panel = p.sorted.panel, panels = p.hidden / panel;
    for (u32 left = __ballot_sync(0xffffffffu, mine.row >= 0); left != 0; left &= left - 1) {
      const int from = __ffs(left) - 1;
      const int place = __shfl_sync(0xffffffffu, mine.row, from);
      const u32 number = __shfl_sync(0xffffffffu, mine.column, from);
      const u32 key = (panel == 128 ? number : number >> 1) * 16;
      store([&](int column) {
        const int in_panel = column & (panel - 1);
        const u64 line = static_cast<u64>(place / kBlockRows * panels + column / panel);
        return p.xq + (line * kBlockRows + place % kBlockRows) * panel + (in_panel ^ key);
      });
    }
  }
  if (sorted && here && tid % kRowThreads < 32) describe_owners(p, token, mine);
}

__device__ void find_largest(const PrefillRouteParams& p, int expert, u32* warps) {
  const u16* scales = p.own.w2_scale + static_cast<u64>(expert) * p.own.expert_scales;
  const int tid = threadIdx.x;
  // Without signs the order of bits is that of numbers. 2^-100 at least: with less, the power of two
  // for results would have no room, and weights would have to make up for it (describe_jobs).
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
  __shared__ int sums[2 * kWarps];
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
  } else if (block < p.sorters + quantizers) {
    quantize_rows(p, (block - p.sorters) * kRows, reinterpret_cast<float*>(sums));
  } else {
    find_largest(p, block - p.sorters - quantizers, reinterpret_cast<u32*>(sums));
  }
}
