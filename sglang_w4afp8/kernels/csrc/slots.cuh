// Small batches: the experts that any token chose, in ascending order, found by every CTA itself.
//
// Every column of a matrix tile is a token of the batch, whether it chose the expert or not; those
// that did not have combine weight 0. No lists, no sorting, and no kernel in front.
#pragma once
#include "primitives.cuh"

constexpr int kMaxPairs = 16 * W4_TOKENS;  // tokens * top_k
constexpr int kMaxExperts = 512;

struct Batch {
  const void* ids;       // (M, top_k) int32 or int64
  int tokens, top_k, experts, ids_are_64;
};

struct Slots {
  u32 hit[kMaxExperts / 32];
  u16 expert[kMaxPairs];  // by slot
  short id[kMaxPairs];    // by pair, -1 where not on this rank
  int count;
};

__device__ __forceinline__ int slot_of(const Slots& s, int expert) {
  const int word = expert >> 5;
  const u32 below = (1u << (expert & 31)) - 1;
  int n = 0;
#pragma unroll
  for (int i = 0; i < kMaxExperts / 32; ++i) {  // all words at once, no chain of loads
    n += __popc(s.hit[i] & (i < word ? 0xffffffffu : i == word ? below : 0u));
  }
  return n;
}

// All threads of the CTA.
__device__ __forceinline__ void find_slots(const Batch& p, Slots& s) {
  const int tid = threadIdx.x, threads = blockDim.x;
  for (int i = tid; i < kMaxExperts / 32; i += threads) s.hit[i] = 0;
  __syncthreads();
  for (int i = tid; i < p.tokens * p.top_k; i += threads) {
    const long long id = p.ids_are_64 ? static_cast<const long long*>(p.ids)[i]
                                      : static_cast<const int*>(p.ids)[i];
    const bool here = id >= 0 && id < p.experts;
    s.id[i] = here ? static_cast<short>(id) : static_cast<short>(-1);
    if (here) atomicOr(&s.hit[id >> 5], 1u << (id & 31));
  }
  __syncthreads();
  for (int e = tid; e < kMaxExperts; e += threads) {
    const int slot = slot_of(s, e);
    const bool hit = (s.hit[e >> 5] >> (e & 31)) & 1;
    if (hit) s.expert[slot] = static_cast<u16>(e);
    if (e == kMaxExperts - 1) s.count = slot + hit;
  }
  __syncthreads();
}
