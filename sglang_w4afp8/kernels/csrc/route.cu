// First kernel of the large-batch path: columns of every token tile, and x in FP8.
//
// Block 0 sorts the (token, k) pairs by expert, in pair order inside an expert, so that the result
// does not depend on timing; each expert's pairs fill tiles of `tile_tokens` columns. The other
// blocks quantise one row of x each.
#include "quantize.cuh"

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxExperts = 512;
constexpr int kKept = 8;      // ids per lane that stay in registers: 4096 pairs
constexpr int kBitWords = 8;  // 256 tokens

struct RouteParams {
  const u16* x;          // (M, hidden) bfloat16
  const void* ids;       // (M, top_k) int32 or int64
  u8* xq;                // (M, hidden) E4M3
  float* x_scale;        // (M) what a column's result is multiplied by
  const float* a_scale;  // (1) static scale, or null: amax of the row / 448
  int* header;           // [0] number of tiles, [1] whether a token may name an expert twice
  int* tile_expert;      // (tiles)
  int* columns;          // (tiles, tile_tokens) pair numbers t * top_k + k, or -1
  int pairs, top_k, hidden, experts, tile_tokens, ids_are_64;
};

__device__ __forceinline__ int expert_of(const RouteParams& p, int pair, int end) {
  if (pair >= end) return -1;
  const long long id = p.ids_are_64 ? static_cast<const long long*>(p.ids)[pair]
                                    : static_cast<const int*>(p.ids)[pair];
  return id >= 0 && id < p.experts ? static_cast<int>(id) : -1;
}

// Thread e has `tokens` pairs for expert e: writes its tiles, returns its first place in columns.
__device__ __forceinline__ int place_tiles(const RouteParams& p, int tokens, int* sums) {
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31;
  const int tiles = (tokens + p.tile_tokens - 1) / p.tile_tokens;
  int sum = tiles;
  for (int d = 1; d < 32; d <<= 1) {
    const int left = __shfl_up_sync(0xffffffffu, sum, d);
    if (lane >= d) sum += left;
  }
  if (lane == 31) sums[warp] = sum;
  __syncthreads();
  int tile = sum - tiles;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) tile += w < warp ? sums[w] : 0;
  if (tid == kThreads - 1) p.header[0] = tile + tiles;
  const int place = tile * p.tile_tokens;
  for (int i = 0; i < tiles; ++i) p.tile_expert[tile + i] = tid;
  for (int i = tokens; i < tiles * p.tile_tokens; ++i) p.columns[place + i] = -1;
  return place;
}

// Up to 256 tokens with distinct experts each: a bit per (expert, token), so that a pair's place is
// a count of bits. False, with nothing written, if a token names an expert twice.
__device__ bool sort_bits(const RouteParams& p, u32 (*bits)[kBitWords], int* places, int* sums) {
  const int tid = threadIdx.x;
  int expert[kKept];
#pragma unroll
  for (int i = 0; i < kKept; ++i) expert[i] = expert_of(p, tid + i * kThreads, p.pairs);
  for (int i = tid; i < kMaxExperts * kBitWords / 4; i += kThreads) {
    reinterpret_cast<uint4*>(&bits[0][0])[i] = make_uint4(0, 0, 0, 0);
  }
  __syncthreads();
  bool twice = false;
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const int token = (tid + i * kThreads) / p.top_k;
    const u32 bit = 1u << (token & 31);
    if (expert[i] >= 0) twice |= (atomicOr(&bits[expert[i]][token >> 5], bit) & bit) != 0;
  }
  if (__syncthreads_or(twice)) return false;
  int tokens = 0;
#pragma unroll
  for (int w = 0; w < kBitWords; ++w) tokens += __popc(bits[tid][w]);
  places[tid] = place_tiles(p, tokens, sums);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const int pair = tid + i * kThreads, token = pair / p.top_k;
    if (expert[i] < 0) continue;
    int rank = 0;
#pragma unroll
    for (int w = 0; w < kBitWords; ++w) {
      const u32 below = (1u << (token & 31)) - 1, word = token >> 5;
      rank += __popc(bits[expert[i]][w] & (w < word ? 0xffffffffu : w == word ? below : 0u));
    }
    p.columns[places[expert[i]] + rank] = pair;
  }
  return true;
}

// Any batch, and tokens that name an expert twice.
__device__ void sort_any(const RouteParams& p, int (*counts)[kMaxExperts], int* sums) {
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31;
  // Each warp walks its own contiguous run of pairs, so warp order is pair order.
  const int run = (p.pairs + kWarps - 1) / kWarps;
  const int begin = warp * run, end = min(p.pairs, begin + run);
  int kept[kKept];
#pragma unroll
  for (int i = 0; i < kKept; ++i) kept[i] = expert_of(p, begin + i * 32 + lane, end);
  for (int i = tid; i < kWarps * kMaxExperts / 4; i += kThreads) {
    reinterpret_cast<int4*>(&counts[0][0])[i] = make_int4(0, 0, 0, 0);
  }
  __syncthreads();
  auto each = [&](auto&& body) {
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      if (begin + i * 32 < end) body(kept[i], begin + i * 32 + lane);
    }
    for (int base = begin + kKept * 32; base < end; base += 32) {
      body(expert_of(p, base + lane, end), base + lane);
    }
  };
  each([&](int e, int) {
    const u32 same = __match_any_sync(0xffffffffu, e);
    if (e >= 0 && lane == __ffs(same) - 1) counts[warp][e] += __popc(same);
    __syncwarp();
  });
  __syncthreads();

  // Thread e: expert e's pairs before each warp's, and its first tile by a scan over experts.
  int before[kWarps], tokens = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) before[w] = counts[w][tid];
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const int n = before[w];
    before[w] = tokens;
    tokens += n;
  }
  const int place = place_tiles(p, tokens, sums);
#pragma unroll
  for (int w = 0; w < kWarps; ++w) counts[w][tid] = before[w] + place;
  __syncthreads();

  each([&](int e, int pair) {
    const u32 same = __match_any_sync(0xffffffffu, e);
    const int rank = __popc(same & ((1u << lane) - 1));
    if (e >= 0) p.columns[counts[warp][e] + rank] = pair;
    __syncwarp();
    if (e >= 0 && rank == 0) counts[warp][e] += __popc(same);
    __syncwarp();
  });
}

extern "C" __global__ void __launch_bounds__(kThreads)
    w4a8_route(const __grid_constant__ RouteParams p) {
  __shared__ __align__(16) int counts[kWarps][kMaxExperts];
  __shared__ int sums[kWarps];
  pdl_wait();
  // The next kernel may read ids, x's scale and nothing else before its own wait.
  pdl_trigger();
  if (blockIdx.x == 0) {
    // The bits and the counts share memory; the bits are done with when the counts are cleared.
    u32(*bits)[kBitWords] = reinterpret_cast<u32(*)[kBitWords]>(&counts[0][0]);
    int* places = &counts[kWarps - 1][0];
    const bool fits = p.pairs <= kKept * kThreads && p.pairs <= p.top_k * kBitWords * 32;
    const bool distinct = fits && sort_bits(p, bits, places, sums);
    if (threadIdx.x == 0) p.header[1] = !distinct;
    if (!distinct) sort_any(p, counts, sums);
  } else {
    quantize_token<kThreads>(p, blockIdx.x - 1, reinterpret_cast<float*>(sums));
  }
}
