// Of prefill_route.cu: the blocks that sort pairs for prefill_own_down.cu.
//
// Four lanes there add to the sums of four tokens at once: those of columns 8 b + 2 q + e of an
// expert, q = 0 .. 3. The banks of shared memory that they need differ if the low two bits of the
// tokens' numbers do (sum_offset); with tokens in any order an addition takes twice as long. So a
// column has a class, q, and a pair goes to a column whose class is that of its token, as long as
// the expert has one. The pairs left over fill the columns left over. Lists begin with a multiple
// of four tokens, and an expert's steps with a multiple of eight of its columns.
#pragma once
#include "prefill_sort.cuh"

// Of n columns those of class k, and the number of the r-th.
__device__ __forceinline__ int columns_of(int n, int k) {
  return n / 8 * 2 + min(max(n % 8 - 2 * k, 0), 2);
}
__device__ __forceinline__ int column_at(int k, int r) { return r / 2 * 8 + 2 * k + r % 2; }

// Where the r-th pair of class k goes, of an expert that has `all` of the classes in a list.
__device__ __forceinline__ int column_for(u64 all, int k, int r) {
  const int n = sum_of(all), over = r - columns_of(n, k);
  if (over < 0) return column_at(k, r);
  int left = over;  // its number among those left over
#pragma unroll
  for (int j = 0; j < kClasses; ++j) {
    left += j < k ? max(of_class(all, j) - columns_of(n, j), 0) : 0;
  }
  int column = 0;
#pragma unroll
  for (int j = 0; j < kClasses; ++j) {
    const int used = of_class(all, j), empty = max(columns_of(n, j) - used, 0);
    if (left >= 0 && left < empty) column = column_at(j, used + left);
    left -= empty;
  }
  return column;
}

// Dynamic shared memory. Classes of an expert are next to each other: its four are also elements
// 4 e + k of an array of u16, as a pair's key is.
struct OwnTables {
  u64 mine[kMaxExperts];    // pairs of this part; later those of the classes before, for up
  u64 before[kMaxExperts];  // of the parts before, in down's list
  u64 all[kMaxExperts];     // of down's list
  // Of pairs: the expert; then the key, the expert and two low bits: the class; then 2^16 ranks
  // more. Or kNotOurs.
  u32 pairs[kPart];
};
constexpr u32 kNotOurs = ~0u;

// Loops over a thread's pairs are not unrolled (but for one that asks for all of them), nor is what
// is done for both kinds of lists written twice: other layers' weights push this code out of the L2
// cache, so it is fetched at every call.

// Whether a token of the block's part names an expert twice; the same for all threads.
__device__ bool names_twice(const PrefillRouteParams& p, int part, int begin, int end,
                            const u32* experts) {
  bool twice = false;
  const bool in_warp = 32 % p.own.top_k == 0;  // a token's pairs are lanes of one warp
#pragma unroll 1
  for (int i = threadIdx.x; begin + (i & -kThreads) < end; i += kThreads) {
    const int pair = begin + i;
    const u32 expert = experts[i];
    const bool ours = expert != kNotOurs;
    const int token = pair / p.own.top_k;
    if (in_warp) {
      const u32 key = ours ? token * kMaxExperts + expert : 1u << 31 | threadIdx.x;
      twice |= (__match_any_sync(0xffffffffu, key) & ((1u << (threadIdx.x & 31)) - 1)) != 0;
    } else if (ours) {
#pragma unroll 1
      for (int other = token * p.own.top_k; other < pair; ++other) {
        twice |= expert_of(p, other) == static_cast<int>(expert);
      }
    }
  }
  twice = __syncthreads_or(twice) != 0;
  if (threadIdx.x == 0) p.own.twice[part] = twice;
  return twice;
}

// A word has the counts of two keys.
__device__ __forceinline__ int half_of(int key) { return (key & 1) * 16; }

// Ranks in the order of pairs: a warp after the other, as this is rare. All threads have read the
// pairs before.
__device__ void rank_in_order(u32* pairs, int count, u32* counts) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
#pragma unroll 1
  for (int first = 0; first < count; first += 32) {
    if (first / 32 % kWarps == warp) {
      const u32 pair = pairs[first + lane], same = __match_any_sync(0xffffffffu, pair);
      const int key = pair != kNotOurs ? pair : 0;
      const int before = counts[key / 2] >> half_of(key) & 0xffff;
      const int rank = before + __popc(same & ((1u << lane) - 1));
      __syncwarp();
      // The word's other half may be another lane's.
      if (pair != kNotOurs) {
        pairs[first + lane] = pair | rank << 16;
        if (same >> lane == 1) atomicAdd(&counts[key / 2], __popc(same) << half_of(key));
      }
    }
    __syncthreads();
  }
}

__device__ void sort_own_part(const PrefillRouteParams& p, int part, OwnTables& tables,
                              WarpSums& sums, int* up_first, int* down_first) {
  const int tid = threadIdx.x, begin = part * p.part_pairs;
  const int end = min(begin + p.part_pairs, p.pairs);
#pragma unroll
  for (int i = 0; i < kMine; ++i) {  // asked for at once
    const int pair = begin + i * kThreads + tid;
    tables.pairs[i * kThreads + tid] = pair < end ? expert_of(p, pair) : kNotOurs;
  }
  tables.mine[tid] = 0;
  const bool twice = names_twice(p, part, begin, end, tables.pairs);
  u32* counts = reinterpret_cast<u32*>(tables.mine);
#pragma unroll 1
  for (int i = tid; begin + i < end; i += kThreads) {
    const u32 expert = tables.pairs[i];
    if (expert == kNotOurs) continue;
    const int token = (begin + i) / p.own.top_k, key = expert * kClasses + token % kClasses;
    const int half = half_of(key);
    const u32 rank = twice ? 0 : atomicAdd(&counts[key / 2], 1u << half) >> half & 0xffff;
    tables.pairs[i] = key | rank << 16;
  }
  __syncthreads();
  if (twice) rank_in_order(tables.pairs, end - begin, counts);
  const u64 mine = tables.mine[tid];
  __stcg(p.own.counts + part * kMaxExperts + tid, mine);
  __stcg(p.counts + part * kMaxExperts + tid, static_cast<u32>(sum_of(mine)));
  exchange_counts(p);
  tables.mine[tid] = sums_before(mine);
  const int first_part = part / p.down.parts * p.down.parts;
  const int last_part = min(first_part + p.down.parts, p.sorters);
  u64 before = 0, all = 0;
#pragma unroll 8
  for (int i = first_part; i < last_part; ++i) {
    const u64 n = __ldcg(p.own.counts + i * kMaxExperts + tid);
    before += i < part ? n : 0;
    all += n;
  }
  tables.before[tid] = before, tables.all[tid] = all;
#pragma unroll 1
  for (int down = 0; down < 2; ++down) {
    const Begin begins = place_part(p, down ? p.down : p.up, part, sums);
    (down ? down_first : up_first)[tid] = down ? begins.all : begins.mine;
  }
  __syncthreads();
  const u16* up_ranks = reinterpret_cast<const u16*>(tables.mine);
  const u16* down_ranks = reinterpret_cast<const u16*>(tables.before);
  const u64 up = list_begin(p, p.up, part), down = list_begin(p, p.down, part);
#pragma unroll 1
  for (int i = tid; begin + i < end; i += kThreads) {
    const int pair = begin + i;
    const u32 found = tables.pairs[i];
    const float weight = p.own.weights[pair];
    p.own.sizes[pair] = found != kNotOurs ? fabsf(weight) : 0.0f;
    if (found == kNotOurs) continue;
    const int key = found & 0xffff, rank = found >> 16, e = key / kClasses;
    const int up_row = up_first[e] + up_ranks[key] + rank;
    const int column = column_for(tables.all[e], key % kClasses, down_ranks[key] + rank);
    const int at = down_first[e] + column;
    p.up.columns[up + up_row] = pair;
    p.own.columns[down + at] = Column{pair, weight};
    p.own.rows[up + up_row] = q_row(down + at, column);
  }
}
