// Of prefill_own_down.cu: its arguments, its shared memory, jobs and their experts.
#pragma once
#include "mma_wide.cuh"

constexpr int kK = W4_K, kLayoutTiles = W4_TILES, kGroup = W4_GROUP, kCluster = W4_CLUSTER;
constexpr int kWgs = W4_WGS, kColumns = W4_TOKENS, kMostTokens = W4_MOST_TOKENS;
constexpr u32 kWeightSlots = W4_WEIGHT_SLOTS, kTokenSlots = W4_TOKEN_SLOTS;
constexpr bool kMinusEight = W4_MINUS_EIGHT != 0, kDynamic = W4_DYNAMIC != 0;
constexpr int kGroups = kK / kGroup, kSteps = kGroup / 32;
constexpr int kTileBytes = kK * 32;                // INT4 of 64 rows
constexpr int kTileScaleBytes = kGroups * 128;
constexpr int kStageBytes = kTileBytes + kTileScaleBytes;
constexpr int kConsumers = kWgs * 128;
constexpr int kThreads = kConsumers + 256;
constexpr int kTokenWarps = W4_TOKEN_WARPS;
constexpr int kWeightWarps = W4_WEIGHT_WARPS;
constexpr int kMaxExperts = 512;  // as in prefill_sort.cuh
// Tokens lie in swizzled panels as in prefill.cuh.
constexpr int kPanel = kK % 128 == 0 ? 128 : 64;
constexpr int kTokenBytes = kColumns * kK;
constexpr int kNobody = 4;  // sums of columns without a pair, of each of four lanes
constexpr u32 kSumBytes = kMostTokens * 128;       // of a list's tokens, for a row tile
// What columns are is needed longer than the tokens themselves.
constexpr u32 kMetaSlots = 2 * kTokenSlots;
static_assert(kColumns % 8 == 0 && kColumns <= 48 && kK % kGroup == 0, "");
// A warpgroup that waits for a slot has done the step kWgs before, and so have the others all steps
// before that: no wait lags two phases behind.
static_assert(kWeightSlots >= kWgs && kTokenSlots >= kWgs, "");
// Nor does one of the warp that fills a slot: it is the same warp every time.
static_assert(kTokenSlots % kTokenWarps == 0, "");
static_assert(kWeightWarps == 1 || kWeightSlots % (kWeightWarps * kCluster) == 0, "");
static_assert(1 + kWeightWarps + kTokenWarps <= 8, "");

struct Weights {
  const u8* w;       // (E, rows, K / 2) in stage order
  const u8* scales;  // (E, rows, K / group) bfloat16 in stage order
  int rows, k;
};

// A pair in its list, sorted by expert (prefill_route.cu).
struct Column {
  int pair;
  float weight;
};

struct PrefillOwnParams {
  Weights weights;
  const u8* b;            // (K / kPanel, b_rows, kPanel) E4M3, swizzled: q_piece in prefill_up.cu
  const Column* columns;  // (lists, list_tokens * top_k)
  const int* first;       // (lists, kMaxExperts + 1) where an expert's columns begin
  const int* twice;       // (lists * parts) whether a token names an expert twice
  const float* sizes;     // (M, top_k) absolute weights
  const float* largest;   // (E) largest scale
  const float* b_scale;   // static: (1); dynamic: (M * top_k)
  u16* out;               // (M, rows) bfloat16
  u32* claimed;           // zero before
  u32* handed;            // (shared, kCluster) parts that are in `sums`; zero before
  u8* sums;               // (shared, kCluster, job_parts - 1, kSumBytes)
  float factor;
  int tokens, top_k, lists, list_tokens, parts, experts, max_steps, b_rows;
  int whole, shared;      // jobs that are not in parts, and those that are cut into shares
  int shares, job_parts;  // shares; parts of a job, at most
};

// An expert and at most kColumns of its columns in this CTA's list, perhaps none.
struct Step {
  u32 bits;
  __device__ __forceinline__ static Step of(int expert, int first, int count) {
    return Step{static_cast<u32>(expert | first << 9 | count << 26)};
  }
  __device__ __forceinline__ int expert() const { return bits & (kMaxExperts - 1); }
  __device__ __forceinline__ int count() const { return bits >> 26; }
  __device__ __forceinline__ int first() const { return bits >> 9 & 0x1ffff; }
};
// Some steps of a row tile for a list. The last jobs may be in parts, which several CTAs work on:
// all but the last part hand their sums to it.
struct __align__(16) Job {
  int steps, tile, list, twice;  // steps: -1 after the last job
  int first, part, parts;        // first step; this part, and how many there are
  u32 place;                     // where parts meet
  float unit;                    // see describe_jobs
};

__shared__ Job jobs[2];
__shared__ u32 numbers[2];  // of jobs, as the first CTA of the cluster has claimed them

__device__ __forceinline__ int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

// What the sums of a token are multiplied by while they are in FP16: 2^(exponent - 127).
__device__ __forceinline__ float scaling(u32 exponent) { return __uint_as_float(exponent << 23); }
__device__ __forceinline__ float scaling_back(u32 exponent) { return scaling(254 - exponent); }
__device__ __forceinline__ u32 load_exponent(u32 address) {
  u32 v;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}

// Where the 64 sums of token t are. The four tokens that a warp adds to at once spread over the
// banks as far as their numbers differ: a sum's byte is XORed with the low bits of t. Columns are
// in an order in which they mostly do (prefill_sort_own.cuh).
__device__ __forceinline__ u32 sum_offset(u32 t) { return t * 128 + ((t & 3) << 5); }

// Descriptor of a panel: swizzled rows, 8 of them every 8 * kPanel bytes.
__device__ __forceinline__ u64 panel_descriptor(u32 address) {
  constexpr u64 kSwizzle = kPanel == 128 ? 1 : 2;
  return static_cast<u64>((address & 0x3ffffu) >> 4) | (1ull << 16) |
         (static_cast<u64>(8 * kPanel >> 4) << 32) | (kSwizzle << 62);
}
__device__ __forceinline__ constexpr u64 column_step(int j) {
  return (j * 32 / kPanel * (kColumns * kPanel) + j * 32 % kPanel) / 16;
}

// Shared memory: slots of tokens, sums, slots of weights, what columns are, steps of two jobs,
// barriers.
struct Shared {
  u32 token_slots, sums, weight_slots, metas, exponent_tables, bars;
  Step* step_tables;
  int max_steps;

  __device__ __forceinline__ static Shared of(u8* shared, int max_steps) {
    Shared s;
    const u32 begin = smem_address(shared);
    s.token_slots = (begin + 1023) & ~1023u;
    s.sums = (s.token_slots + kTokenSlots * kTokenBytes + 127) & ~127u;
    s.weight_slots = s.sums + (kMostTokens + kNobody) * 128;
    s.metas = s.weight_slots + kWeightSlots * kStageBytes;
    s.exponent_tables = s.metas + kMetaSlots * kColumns * 8;
    const u32 tables = s.exponent_tables + 2 * kMostTokens;
    s.max_steps = max_steps;
    s.step_tables = reinterpret_cast<Step*>(shared + (tables - begin));
    s.bars = tables + 2 * max_steps * sizeof(Step);
    return s;
  }
  __device__ __forceinline__ u32 tokens(u32 i) const { return token_slots + i * kTokenBytes; }
  __device__ __forceinline__ u32 weights(u32 i) const { return weight_slots + i * kStageBytes; }
  __device__ __forceinline__ u32 meta(u32 i) const { return metas + i * (kColumns * 8); }
  __device__ __forceinline__ u32 exponents(int i) const {
    return exponent_tables + i * kMostTokens;
  }
  __device__ __forceinline__ Step* steps(int i) const { return step_tables + i * max_steps; }
  __device__ __forceinline__ static Job* job(int i) { return &jobs[i]; }

  __device__ __forceinline__ u32 weights_full(u32 i) const { return bars + i * 16; }
  __device__ __forceinline__ u32 weights_empty(u32 i) const { return bars + i * 16 + 8; }
  __device__ __forceinline__ u32 tokens_full(u32 i) const { return weights_full(kWeightSlots + i); }
  __device__ __forceinline__ u32 tokens_empty(u32 i) const { return tokens_full(i) + 8; }
  __device__ __forceinline__ u32 table_full(int i) const { return tokens_full(kTokenSlots + i); }
  __device__ __forceinline__ u32 table_empty(int i) const { return table_full(i) + 8; }
  __device__ __forceinline__ u32 number_full(int i) const { return table_full(2 + i); }
  __device__ __forceinline__ u32 number_empty(int i) const { return table_full(2 + i) + 8; }
  __device__ __forceinline__ u32 turn(int wg, int warp) const {
    return table_full(4) + (wg * 4 + warp) * 8;
  }

  // One thread.
  __device__ __forceinline__ void set_up() const {
    for (u32 i = 0; i < kWeightSlots; ++i) {
      barrier_init(weights_full(i), 1);
      barrier_init(weights_empty(i), 4 * kCluster * kLanes);
    }
    for (u32 i = 0; i < kTokenSlots; ++i) {
      barrier_init(tokens_full(i), 1 + kLanes);  // the copies, and what columns are
      barrier_init(tokens_empty(i), 4 * kLanes);
    }
    for (int i = 0; i < 2; ++i) {
      barrier_init(table_full(i), kLanes);
      barrier_init(table_empty(i), (kConsumers / 32 + kWeightWarps + kTokenWarps) * kLanes);
      barrier_init(number_full(i), 1);
      barrier_init(number_empty(i), kCluster * kLanes);
    }
    for (int i = 0; i < kWgs * 4; ++i) barrier_init(turn(i / 4, i % 4), kLanes);
    barrier_init_fence();
    for (u32 i = 0; i < kWeightSlots; ++i) barrier_expect(weights_full(i), kStageBytes);
    for (int i = 0; i < 4; ++i) barrier_arrive(turn(0, i), kLanes);
  }
};

// The same barrier of CTA `to` of the cluster.
__device__ __forceinline__ void arrive_at(u32 bar, u32 to, u32 rank) {
  if (kCluster == 1 || to == rank) {
    barrier_arrive(bar);
  } else {
    barrier_arrive_at(bar, to);
  }
}

__device__ __forceinline__ void copy_to_all(u32 dst, const void* src, u32 bytes, u32 bar) {
  if constexpr (kCluster == 1) {
    bulk_copy(dst, src, bytes, bar);
  } else {
    bulk_copy_to_all(dst, src, bytes, bar, kCluster);
  }
}

// ---- jobs ---------------------------------------------------------------------------------------
// 0, which the compiler does not know: a way to make an address wait for a value.
__device__ __forceinline__ u32 unknown_zero(const PrefillOwnParams& p) {
  return static_cast<u32>(p.lists) >> 31;
}

// Claims for the cluster: the first CTA tells all of them. A whole warp; returns the job's number.
__device__ __forceinline__ u32 next_number(const PrefillOwnParams& p, const Shared& s, u32 rank,
                                           int n) {
  const int lane = threadIdx.x & 31, i = n & 1;
  if constexpr (kCluster == 1) {
    return uniform(lane == 0 ? atomicAdd(p.claimed, 1u) : 0);
  } else {
    if (rank == 0) {
      barrier_wait(s.number_empty(i), (n >> 1 & 1) ^ 1);
      const u32 number = uniform(lane == 0 ? atomicAdd(p.claimed, 1u) : 0);
      if (lane < kCluster) {
        store_at(smem_address(&numbers[i]), number, lane);
        barrier_release_at(s.number_full(i), lane);
      }
    }
    barrier_wait_cluster(s.number_full(i), n >> 1 & 1);
    const u32 number = lds32(smem_address(&numbers[i]));
    __syncwarp();
    // The address waits for what was read.
    const u32 empty = s.number_empty(i) | (number & unknown_zero(p));
    if (kEveryLane || lane == 0) barrier_arrive_at(empty, 0);
    return number;
  }
}

// What a claimed number stands for: a job, or a part of one of the last. Those are cut into shares
// of equal size, wherever that is: a share may be the end of a job and the beginning of the next
// one. The beginning is done first (`more`: the end comes then), as whoever has a job's last part
// waits for the others. A part is `begin` to `end` of p.shares.
struct Claimed {
  int job, begin, end, part, parts;
  bool more;
};
__device__ __forceinline__ Claimed claimed_part(const PrefillOwnParams& p, int number, bool again) {
  if (number < p.whole || p.shared == 0) return Claimed{number, 0, p.shares, 0, 1, false};
  const int share = number - p.whole, from = share * p.shared, to = from + p.shared;
  const int ends = from / p.shares, begins = (to - 1) / p.shares;
  const int job = again ? ends : begins, start = job * p.shares, end = start + p.shares;
  const int first = start / p.shared, last = (end - 1) / p.shared;  // shares of the job
  return Claimed{p.whole + job, max(from - start, 0), min(to - start, p.shares), share - first,
                 last - first + 1, !again && ends != begins};
}

// The power of two that brings what is at most `bound` below 2^15, see scaling(). FP16 has 30 of
// them, so it matters little that bounds are far above what sums are: 12 remain below a usual one's
// last bit.
__device__ __forceinline__ u32 exponent_for(float bound) {
  // bound < 2^(e - 126)
  const int e = static_cast<int>(__float_as_uint(bound) >> 23 & 255);
  return min(max(127 + 15 - (e - 126), 27), 227);
}

// One warp: those of the sums of a list's tokens.
__device__ __forceinline__ void describe_sums(const PrefillOwnParams& p, int list, float bound,
                                              u32 exponents) {
  const int first = list * p.list_tokens, count = min(p.list_tokens, p.tokens - first);
  const float b_scale = kDynamic ? 1.0f : *p.b_scale;
#pragma unroll 4
  for (int t = threadIdx.x & 31; t < count; t += 32) {
    const u64 pair = static_cast<u64>(first + t) * p.top_k;
    float sum = 0.0f;
#pragma unroll 8
    for (int k = 0; k < p.top_k; ++k) {
      const float size = p.sizes[pair + k];
      if (size > 0.0f) sum += kDynamic ? size * p.b_scale[pair + k] : size;
    }
    const u32 exponent = exponent_for(sum * bound * b_scale);
    asm volatile("st.shared.u8 [%0], %1;" ::"r"(exponents + t), "r"(exponent) : "memory");
  }
}

// The first step of a part that begins at `at` of `all`. An expert is in one part only: which of
// its columns are in which of its steps may differ from run to run, and the order in which a
// token's contributions are added up must not.
__device__ __forceinline__ int part_begin(const Step* steps, int count, int at, int all) {
  int begin = count * at / all;
  while (begin > 0 && begin < count && steps[begin].expert() == steps[begin - 1].expert()) ++begin;
  return begin;
}

// One warp: which experts a job needs. Those of all lists of the cluster, as weights come to all.
//
// Results are FP16 before they are weighted: times `unit`, with which none overflows that is bound
// by 2^115, and 512, as codes are decoded to 2^-9 of them. A column's weight takes `unit` back
// (produce_tokens).
__device__ __forceinline__ void describe_jobs(const PrefillOwnParams& p, const Shared& s, u32 rank) {
  const int lane = threadIdx.x & 31;
  const int groups = (p.lists + kCluster - 1) / kCluster, tiles = p.weights.rows / 64;
  float largest = 0.0f;
  for (int e = lane; e < p.experts; e += 32) largest = fmaxf(largest, p.largest[e]);
  for (int d = 16; d; d >>= 1) {
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, d));
  }
  // Of a result before its weight and the scale of its tokens: |q| <= 448, codes up to 8.
  const float bound = largest * (kFp8Max * 8.0f * kK);
  const float unit = scaling(exponent_for(bound));
  int number = 0, claims = 0;
  bool more = false;
  for (int n = 0;; ++n) {
    if (!more) number = next_number(p, s, rank, claims++);
    barrier_wait(s.table_empty(n & 1), (n >> 1 & 1) ^ 1);
    const Claimed claimed = claimed_part(p, number, more);
    more = claimed.more;
    // Lists run inside row tiles: a tile's weights are read from memory once.
    const int tile = claimed.job / groups, group = claimed.job % groups * kCluster;
    const int list = group + rank;
    Job job{-1, tile, list, 0, 0, claimed.part, claimed.parts, 0, unit};
    if (tile < tiles) {
      Step* steps = s.steps(n & 1);
      int count = 0;
#pragma unroll 2
      for (int begin = 0; begin < p.experts; begin += 32) {
        const int e = begin + lane;
        int own = 0, own_end = 0, most = 0;
#pragma unroll
        for (int r = 0; r < kCluster; ++r) {
          if (group + r >= p.lists || e >= p.experts) continue;
          const int* first = p.first + static_cast<u64>(group + r) * (kMaxExperts + 1) + e;
          const int from = first[0], to = first[1];
          most = max(most, to - from);
          if (r == rank) own = from, own_end = to;
        }
        const int mine = (most + kColumns - 1) / kColumns;
        int before = mine;
        for (int d = 1; d < 32; d <<= 1) {
          const int other = __shfl_up_sync(0xffffffffu, before, d);
          if (lane >= d) before += other;
        }
        for (int i = 0; i < mine; ++i) {
          const int at = min(own + i * kColumns, own_end);
          steps[count + before - mine + i] = Step::of(e, at, min(own_end - at, kColumns));
        }
        count += __shfl_sync(0xffffffffu, before, 31);
      }
      __syncwarp();
      job.first = part_begin(steps, count, claimed.begin, p.shares);
      job.steps = part_begin(steps, count, claimed.end, p.shares) - job.first;
      job.place = (claimed.job - p.whole) * kCluster + rank;
      for (int i = 0; list < p.lists && i < p.parts; ++i) {
        const int sorter = list * p.parts + i;  // the last list may have fewer
        if (sorter * (p.list_tokens / p.parts) < p.tokens) job.twice |= p.twice[sorter];
      }
      describe_sums(p, list, bound, s.exponents(n & 1));
    }
    if (lane == 0) jobs[n & 1] = job;
    __syncwarp();
    if (kEveryLane || lane == 0) barrier_arrive(s.table_full(n & 1));
    if (job.steps < 0) return;
  }
}
