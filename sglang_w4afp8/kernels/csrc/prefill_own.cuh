// What feeds prefill_own_down.cu: weights and tokens of its jobs.
#pragma once
#include "prefill_own_jobs.cuh"

// ---- weights -------------------------------------------------------------------------------------
// CTAs of a cluster, and kWeightWarps warps in each, take steps in turn and send to all.
__device__ __forceinline__ void produce_weights(const PrefillOwnParams& p, const Shared& s,
                                                u32 rank, u32 part) {
  const int lane = threadIdx.x & 31;
  const u64 w_expert = static_cast<u64>(p.weights.rows) * (kK / 2);
  const u64 s_expert = static_cast<u64>(p.weights.rows) * (kGroups * 2);
  u32 number = 0, phases = 0;  // a bit for each slot
  for (int n = 0;; ++n) {
    barrier_wait(s.table_full(n & 1), n >> 1 & 1);
    const Job job = *s.job(n & 1);
    if (job.steps < 0) return;
    const u8* w = p.weights.w + static_cast<u64>(job.tile) * kTileBytes;
    const u8* scales = p.weights.scales + static_cast<u64>(job.tile) * kTileScaleBytes;
    const Step* steps = s.steps(n & 1) + job.first;
    constexpr u32 kTurns = kCluster * kWeightWarps;
    static_assert((kTurns & (kTurns - 1)) == 0, "numbers wrap around");
    const u32 steps_here = job.steps, turn = (rank + kCluster * part - number) % kTurns;
    for (u32 i = turn; i < steps_here; i += kTurns) {
      const u32 slot = (number + i) % kWeightSlots;
      if (number + i >= kWeightSlots) {
        barrier_wait(s.weights_empty(slot), phases >> slot & 1);
        phases ^= 1u << slot;
      }
      const u64 expert = steps[i].expert();
      if (lane < 2) {
        const u8* from = lane == 0 ? w + expert * w_expert : scales + expert * s_expert;
        copy_to_all(s.weights(slot) + lane * kTileBytes, from,
                    lane == 0 ? kTileBytes : kTileScaleBytes, s.weights_full(slot));
      }
      __syncwarp();
    }
    number += steps_here;
    __syncwarp();
    if (kEveryLane || lane == 0) barrier_arrive(s.table_empty(n & 1));
  }
}

// ---- tokens --------------------------------------------------------------------------------------
// A step that must wait: its job's table is written when the job of the step that this warp still
// holds has ended.
constexpr int kLater = -2;

// A lane's columns of a step to come.
struct Coming {
  u32 number;  // of the step, over all jobs
  int here;    // columns; -1 after the last step; kLater
  int base;    // first pair of the list
  int first;   // row of b
  u32 exponents;
  Column column[2];  // the second is 32 further on
};

// kTokenWarps warps take steps in turn: rows of the tokens, where each column's sums are, its
// weight.
__device__ __forceinline__ void produce_tokens(const PrefillOwnParams& p, const Shared& s,
                                               int part) {
  const int lane = threadIdx.x & 31;
  const float b_scale = kDynamic ? 0.0f : *p.b_scale;
  const u32 inverse_top_k = 0xffffffffu / p.top_k + 1;  // exact: a list has few pairs
  const int list_pairs = p.list_tokens * p.top_k;
  Job job{};
  float without_unit = 0.0f;
  int n = -1, own = part;
  u32 base = 0;
  auto fetch = [&](bool holds) {
    Coming coming{0, -1, 0, 0, 0, {{0, 0.0f}, {0, 0.0f}}};
    const int of_held = n;
    while (own >= job.steps) {
      if (holds && n > of_held) {
        coming.here = kLater;
        return coming;
      }
      own -= job.steps, base += job.steps;
      __syncwarp();
      if (n >= 0 && (kEveryLane || lane == 0)) barrier_arrive(s.table_empty(n & 1));
      ++n;
      barrier_wait(s.table_full(n & 1), n >> 1 & 1);
      job = *s.job(n & 1);
      if (job.steps < 0) return coming;
      without_unit = __frcp_rn(job.unit);  // a power of two
    }
    const Step step = s.steps(n & 1)[job.first + own];
    coming.number = base + own, coming.here = step.count(), coming.base = job.list * list_pairs;
    coming.first = coming.base + step.first();
    own += kTokenWarps;
    coming.exponents = s.exponents(n & 1);
    const Column* from = p.columns + coming.first + lane;
    if (lane < coming.here) coming.column[0] = from[0];
    if (kColumns > 32 && lane + 32 < coming.here) coming.column[1] = from[32];
    return coming;
  };
  Coming now = fetch(false);
  constexpr int kColumnsOfLane = (kColumns + 31) / 32;
  while (now.here >= 0) {
    // Asked for before anything is waited for: a column's pair came while the step before was made.
    float scale[kColumnsOfLane];
#pragma unroll
    for (int i = 0; i < kColumnsOfLane; ++i) {
      scale[i] = b_scale;
      if (kDynamic && lane + i * 32 < now.here) scale[i] = __ldcg(p.b_scale + now.column[i].pair);
    }
    const Coming then = fetch(true);
    const u32 slot = now.number % kTokenSlots, full = s.tokens_full(slot);
    barrier_wait(s.tokens_empty(slot), (now.number / kTokenSlots & 1) ^ 1);
    if (lane == 0) barrier_expect(full, now.here * kK);
    __syncwarp();
    if (lane < kK / kPanel && now.here > 0) {
      bulk_copy(s.tokens(slot) + lane * (kColumns * kPanel),
                p.b + (static_cast<u64>(lane) * p.b_rows + now.first) * kPanel,
                now.here * kPanel, full);
    }
#pragma unroll
    for (int i = 0; i < kColumnsOfLane; ++i) {
      if (i > 0 && now.here <= i * 32) break;  // nobody reads these
      const Column& column = now.column[i];
      // Lanes of the warps that add have other sums where there is no pair.
      u32 at = s.sums + sum_offset(kMostTokens + (lane >> 1) % kNobody);
      float weight = 0.0f;
      if (lane + i * 32 < now.here) {
        const u32 local = column.pair - now.base;
        const u32 t = p.top_k == 1 ? local : __umulhi(local, inverse_top_k);
        at = s.sums + sum_offset(t);
        weight = column.weight * scale[i] * scaling(load_exponent(now.exponents + t)) * without_unit;
      }
      if (lane + i * 32 < kColumns) {
        asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(
                         s.meta(now.number % kMetaSlots) + (lane + i * 32) * 8),
                     "r"(at), "r"(pack_half(weight, weight))
                     : "memory");
      }
    }
    __syncwarp();
    if (kEveryLane || lane == 0) barrier_arrive(full);
    now = then.here == kLater ? fetch(false) : then;
  }
}
