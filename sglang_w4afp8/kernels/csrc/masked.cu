// First kernel for rows that a dispatcher has put into slots of their experts: the token tiles.
//
// Row m of expert e is number e * slots + m; the first masked_m[e] are there, what follows is
// neither read nor written. Blocks (e, 0) list the tiles of expert e, blocks (e, 1 ...) quantise
// its rows if they came in BF16. Same lists as route.cu's, for pairs with top_k = 1.
#include "quantize.cuh"

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

struct MaskedParams {
  const int* masked_m;   // (E), E at most kThreads
  const u16* x;          // (E, slots, hidden) bfloat16; not read with one block an expert
  u8* xq;                // (E, slots, hidden) E4M3
  float* x_scale;        // (E, slots)
  const float* a_scale;  // (1) static scale, or null
  int* header;           // [0] number of tiles
  int* tile_expert;      // (tiles)
  int* columns;          // (tiles, tile_tokens) row numbers, or -1
  int experts, slots, hidden, tile_tokens;
};

__device__ __forceinline__ int rows_of(const MaskedParams& p, int expert) {
  return min(max(p.masked_m[expert], 0), p.slots);
}

__device__ void list_expert(const MaskedParams& p, int expert, int* sums) {
  const int tid = threadIdx.x, width = p.tile_tokens;
  int before = tid < expert ? (rows_of(p, tid) + width - 1) / width : 0;
  for (int d = 16; d; d >>= 1) before += __shfl_xor_sync(0xffffffffu, before, d);
  if ((tid & 31) == 0) sums[tid >> 5] = before;
  __syncthreads();
  int first = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) first += sums[w];
  const int rows = rows_of(p, expert), tiles = (rows + width - 1) / width;
  for (int i = tid; i < tiles; i += kThreads) p.tile_expert[first + i] = expert;
  for (int i = tid; i < tiles * width; i += kThreads) {
    p.columns[first * width + i] = i < rows ? expert * p.slots + i : -1;
  }
  if (expert == p.experts - 1 && tid == 0) p.header[0] = first + tiles;
}

extern "C" __global__ void __launch_bounds__(kThreads)
    w4a8_masked(const __grid_constant__ MaskedParams p) {
  __shared__ int sums[kWarps];
  pdl_wait();
  // The next kernel reads nothing of this one's before its own wait.
  pdl_trigger();
  const int expert = blockIdx.x;
  if (blockIdx.y == 0) {
    list_expert(p, expert, sums);
    return;
  }
  const int rows = rows_of(p, expert);
  for (int m = blockIdx.y - 1; m < rows; m += gridDim.y - 1) {
    quantize_token<kThreads>(p, expert * p.slots + m, reinterpret_cast<float*>(sums));
    __syncthreads();
  }
}
