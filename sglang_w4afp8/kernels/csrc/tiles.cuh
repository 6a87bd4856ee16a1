// The list of token tiles, found by every CTA itself from the routing alone.
//
// The first kernel writes the same list for those who come later; the matrix kernel beside it needs
// the experts' order now, to start on their weights.
#pragma once
#include "primitives.cuh"

constexpr int kMaxExperts = 512;
constexpr int kMaxEarlyPairs = 4096;
constexpr int kMaxEarlyTiles = 1024;  // experts + pairs / 8

struct TileList {
  int counts[kMaxExperts];
  int sums[8];
  int total;
  u16 expert[kMaxEarlyTiles];
};

// All threads, of which the first 256 own two experts each. `pairs` is at most kMaxEarlyPairs.
template <int kTokens>
__device__ __forceinline__ void list_tiles(const void* ids, int ids_are_64, int pairs, int experts,
                                           TileList& list) {
  const int tid = threadIdx.x, threads = blockDim.x, lane = tid & 31;
  for (int i = tid; i < kMaxExperts; i += threads) list.counts[i] = 0;
  __syncthreads();
#pragma unroll 8
  for (int i = tid; i < pairs; i += threads) {
    const long long id = ids_are_64 ? static_cast<const long long*>(ids)[i]
                                    : static_cast<const int*>(ids)[i];
    if (id >= 0 && id < experts) atomicAdd(&list.counts[id], 1);
  }
  __syncthreads();
  int tiles[2] = {0, 0}, sum = 0;
  if (tid < 256) {
#pragma unroll
    for (int i = 0; i < 2; ++i) tiles[i] = (list.counts[2 * tid + i] + kTokens - 1) / kTokens;
    sum = tiles[0] + tiles[1];
    for (int d = 1; d < 32; d <<= 1) {
      const int before = __shfl_up_sync(0xffffffffu, sum, d);
      if (lane >= d) sum += before;
    }
    if (lane == 31) list.sums[tid >> 5] = sum;
  }
  __syncthreads();
  if (tid < 256) {
    int at = sum - tiles[0] - tiles[1];
    for (int w = 0; w < (tid >> 5); ++w) at += list.sums[w];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < tiles[i]; ++j) list.expert[at++] = static_cast<u16>(2 * tid + i);
    }
    if (tid == 255) list.total = at;
  }
  __syncthreads();
}
