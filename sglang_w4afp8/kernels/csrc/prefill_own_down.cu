// Down of the prefill path for a short K: w2 times the FP8 products, summed over experts where they
// are made.
//
// A CTA owns 64 outputs of one list of at most W4_MOST_TOKENS tokens at a time. It goes through the
// experts in order, reads those 64 rows of each, and adds every pair's result, times its combine
// weight, to its token's sum in shared memory: nothing but the output is written to memory, and the
// sums of jobs in parts; results do not depend on timing. Sums are FP16, so that there is room for
// many tokens, times a power of two for each token which keeps them finite as long as they are
// bound by 2^115 (describe_sums). Weights would be read once for every list, so W4_CLUSTER CTAs
// with different lists and the same rows form a cluster and a stage of weights is sent to all of
// them.
//
// Warpgroups take experts in turn. While one adds, the others load, decode and multiply: warp w of
// every warpgroup adds to the same 16 outputs, and they pass the right to do so on, expert by
// expert. W4_K is all of K. W4_TILES, W4_GROUP, W4_MINUS_EIGHT: as ever (hopper/layout.py).
#include "prefill_own.cuh"

// Whether weights of a warpgroup's next step are loaded before its turn in this one. The slot's
// last user must be done, or the wait would lag two phases behind: with few slots that is known
// only later.
constexpr bool kEarly = kWeightSlots >= 2 * kWgs;

struct OwnBody {
  const PrefillOwnParams& p;
  const Shared& s;
  u32 rank;
  int wg, warp, lane;  // warp: of the warpgroup
  u32 codes_at, scales_at;  // this thread's in a stage
  u32 zero;            // unknown_zero
  u32 turns = 0;       // that this warpgroup has had
  float unit = 0.0f;   // of the job, times what codes are decoded to
  uint4 codes[kK / 64];  // of the next step
  u32 scales[kGroups];

  template <int kN>
  __device__ __forceinline__ void run(const u32 (&a)[kK / 8], u32 number, bool another,
                                      bool twice) {
    float v[kN / 2];
    multiply<kN>(v, a, s.tokens(number % kTokenSlots));
    // Tokens may be overwritten. What columns are is not before kTokenSlots further steps, and
    // those wait for this one's turn to pass.
    __syncwarp();
    if (kEveryLane || lane == 0) barrier_arrive(s.tokens_empty(number % kTokenSlots));
    if (kEarly && another) load(number + kWgs);
    add<kN>(v, s.meta(number % kMetaSlots), twice);
  }

  template <int kN>
  __device__ __forceinline__ void multiply(float (&v)[kN / 2], const u32 (&a)[kK / 8],
                                           u32 tokens) {
    const u64 b = panel_descriptor(tokens);
    constexpr int kTogether = kGroups <= 2 ? kGroups : 1;
#pragma unroll
    for (int begin = 0; begin < kGroups; begin += kTogether) {
      float part[kTogether][kN / 2];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) pin(part[i]);
      mma_fence();
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
#pragma unroll
        for (int j = 0; j < kSteps; ++j) {
          const int at = (begin + i) * kSteps + j;
          Mma<kN>::issue(part[i], a[4 * at], a[4 * at + 1], a[4 * at + 2], a[4 * at + 3],
                         b + column_step(at), j);
        }
      }
      mma_commit();
      mma_wait<0>();
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        pin(part[i]);
        const float s0 = bf16_low(scales[begin + i]) * unit;
        const float s1 = bf16_high(scales[begin + i]) * unit;
#pragma unroll
        for (int c = 0; c < kN / 2; ++c) {
          const float by = c & 2 ? s1 : s0;
          v[c] = begin + i == 0 ? part[i][c] * by : v[c] + part[i][c] * by;
        }
      }
    }
  }

  // To the sums of the tokens. Columns without a pair have a row of their own that nobody reads. As
  // little as can be is done while it is this warpgroup's turn.
  template <int kN>
  __device__ __forceinline__ void add(const float (&v)[kN / 2], u32 meta, bool twice) {
    const int g = lane >> 2, q = lane & 3;
    const u32 mine = warp * 32 + g * 4;
    u32 at[kN / 4], more[kN / 4], by[kN / 4];
#pragma unroll
    for (int b = 0; b < kN / 8; ++b) {
      const uint4 m = lds128(meta + b * 64 + q * 16);
      at[2 * b] = m.x ^ mine, more[2 * b] = pack_half(v[4 * b], v[4 * b + 2]), by[2 * b] = m.y;
      at[2 * b + 1] = m.z ^ mine, more[2 * b + 1] = pack_half(v[4 * b + 1], v[4 * b + 3]);
      by[2 * b + 1] = m.w;
    }
#pragma unroll
    for (int c = 0; c < kN / 4; ++c) more[c] = kept(more[c]);
    wait_turn();
    if (!twice) {
      u32 old[kN / 4];
#pragma unroll
      for (int c = 0; c < kN / 4; ++c) old[c] = lds32(at[c]);
#pragma unroll
      for (int c = 0; c < kN / 4; ++c) sts32(at[c], fma_halves(more[c], by[c], old[c]));
      return;
    }
    // Two columns may be the same token: one after the other.
#pragma unroll
    for (int b = 0; b < kN / 8; ++b) {
      for (int turn = 0; turn < 4; ++turn) {
        if (turn == q) {
#pragma unroll
          for (int c = 2 * b; c < 2 * b + 2; ++c) {
            sts32(at[c], fma_halves(more[c], by[c], lds32(at[c])));
          }
        }
        __syncwarp();
      }
    }
  }

  __device__ __forceinline__ void wait_turn() { barrier_wait(s.turn(wg, warp), turns & 1); }
  __device__ __forceinline__ void pass_turn() {
    ++turns;
    __syncwarp();
    if (kEveryLane || lane == 0) barrier_arrive(s.turn(wg + 1 == kWgs ? 0 : wg + 1, warp));
  }

  // Weights of step `number`, counted over all jobs. Their slot is free for its next user then, and
  // expects it.
  __device__ __forceinline__ void load(u32 number) {
    const u32 slot = number % kWeightSlots, full = s.weights_full(slot);
    const u32 w = s.weights(slot) + codes_at, scale_at = s.weights(slot) + scales_at;
    barrier_wait(full, number / kWeightSlots & 1);
#pragma unroll
    for (int i = 0; i < kK / 64; ++i) codes[i] = lds128(w + i * 2048);
#pragma unroll
    for (int i = 0; i < kGroups; ++i) scales[i] = lds32(scale_at + i * 128);
    if (warp == 0 && lane == 0) barrier_expect(full, kStageBytes);
    // An arrival in another CTA is not ordered behind loads here, so its address waits for the last
    // of either kind. They return as issued; that none is issued behind both is the compiler's
    // choice, seen in machine code. The slot is filled again no sooner than after a trip through
    // that CTA and L2.
    const u32 known = kCluster > 1 ? (codes[kK / 64 - 1].w | scales[kGroups - 1]) & zero : 0;
    __syncwarp();
    if (kEveryLane || lane == 0) {
      arrive_at(s.weights_empty(slot) | known, (number + kWeightSlots) % kCluster, rank);
    }
  }

  // A step whose weights are loaded; and then those of the next one, if it is of the same job.
  __device__ __forceinline__ void take(Step step, u32 number, bool another, bool twice) {
    u32 a[kK / 8];
#pragma unroll
    for (int i = 0; i < kK / 64; ++i) {
      const uint4 v = codes[i];
      decode_int4<kMinusEight>(v.x, a[8 * i + 0], a[8 * i + 1]);
      decode_int4<kMinusEight>(v.y, a[8 * i + 2], a[8 * i + 3]);
      decode_int4<kMinusEight>(v.z, a[8 * i + 4], a[8 * i + 5]);
      decode_int4<kMinusEight>(v.w, a[8 * i + 6], a[8 * i + 7]);
    }
    // Decoded before the wait and before the matrix unit owns any registers.
#pragma unroll
    for (int i = 0; i < kK / 8; ++i) a[i] = kept(a[i]);
    const u32 at = number % kTokenSlots;
    barrier_wait(s.tokens_full(at), number / kTokenSlots & 1);
    const int count = uniform(step.count());
    // Most steps have more than 24 (hopper/plan_own.py, OWN_USUAL_COLUMNS).
    if (kColumns > 24 && count > 24) {
      if (count <= 32) {
        if constexpr (kColumns >= 32) run<32>(a, number, another, twice);
      } else if (count <= 40) {
        if constexpr (kColumns >= 40) run<40>(a, number, another, twice);
      } else {
        if constexpr (kColumns >= 48) run<48>(a, number, another, twice);
      }
    } else if (count > 16) {
      if constexpr (kColumns >= 24) run<24>(a, number, another, twice);
    } else if (count > 8) {
      run<16>(a, number, another, twice);
    } else if (count > 0) {
      run<8>(a, number, another, twice);
    } else {
      __syncwarp();
      if (kEveryLane || lane == 0) barrier_arrive(s.tokens_empty(at));
      if (kEarly && another) load(number + kWgs);
      wait_turn();
    }
    pass_turn();
    if (!kEarly && another) load(number + kWgs);
  }

  // The sums of a list's tokens to memory; they are zero after it.
  __device__ __forceinline__ void finish(int n) {
    const Job job = *s.job(n & 1);  // again: the steps leave no registers for it
    const u32 exponents = s.exponents(n & 1);
    named_sync(1, kConsumers);
    const int first = job.list * p.list_tokens;
    const int count = max(0, min(p.list_tokens, p.tokens - first));
    if (job.part + 1 < job.parts) {
      hand_over(job, count);
      return;
    }
    if (job.parts > 1) take_over(job, count);
    if constexpr (kLayoutTiles == 1) {
      write_rows(job, first, count * 8, exponents);
    } else {
      write_pieces(job, first, count, exponents);
    }
    named_sync(1, kConsumers);
  }

  // Sums of one of a job's parts, and their place in memory.
  __device__ __forceinline__ u8* place_of(const Job& job, int part) const {
    const u32 place = job.place * static_cast<u32>(p.job_parts - 1) + static_cast<u32>(part);
    return p.sums + place * static_cast<u64>(kSumBytes);
  }
  __device__ __forceinline__ void hand_over(const Job& job, int count) {
    u8* to = place_of(job, job.part);
    for (int i = threadIdx.x * 16; i < count * 128; i += kConsumers * 16) {
      *reinterpret_cast<uint4*>(to + i) = lds128(s.sums + i);
      sts128(s.sums + i, make_uint4(0, 0, 0, 0));
    }
    named_sync(1, kConsumers);
    if (threadIdx.x == 0) {
      asm volatile("fence.acq_rel.gpu;" ::: "memory");
      u32* handed = p.handed + job.place;
      asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(handed) : "memory");
    }
  }
  // Adds those of the parts before, in their order. CTAs are at them: they are in shares of smaller
  // numbers, and no share begins with a part that waits for another one.
  __device__ __forceinline__ void take_over(const Job& job, int count) {
    if (threadIdx.x == 0) {
      u32 seen;
      do {
        asm volatile("ld.acquire.gpu.u32 %0, [%1];"
                     : "=r"(seen)
                     : "l"(p.handed + job.place)
                     : "memory");
      } while (seen + 1 < static_cast<u32>(job.parts));
    }
    named_sync(1, kConsumers);
    constexpr int kAtOnce = 4, kStride = kConsumers * 16;
    for (int part = 0; part + 1 < job.parts; ++part) {
      const u8* from = place_of(job, part);
      for (int begin = threadIdx.x * 16; begin < count * 128; begin += kAtOnce * kStride) {
        uint4 v[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          const int i = begin + j * kStride;
          if (i < count * 128) v[j] = __ldcg(reinterpret_cast<const uint4*>(from + i));
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          const int i = begin + j * kStride;
          if (i >= count * 128) continue;
          const uint4 sum = lds128(s.sums + i);
          sts128(s.sums + i, make_uint4(add_halves(sum.x, v[j].x), add_halves(sum.y, v[j].y),
                                        add_halves(sum.z, v[j].z), add_halves(sum.w, v[j].w)));
        }
      }
    }
    named_sync(1, kConsumers);
  }

  // A token's 64 outputs are next to each other: `pieces` of 8.
  __device__ __forceinline__ void write_rows(const Job& job, int first, int pieces, u32 exponents) {
    constexpr int kAtOnce = 4;
    for (int begin = threadIdx.x; begin < pieces; begin += kAtOnce * kConsumers) {
      uint4 v[kAtOnce];
      u32 exponent[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int i = begin + j * kConsumers, t = i >> 3;
        if (i < pieces) {
          v[j] = lds128((s.sums + sum_offset(t)) ^ ((i & 7) * 16));
          exponent[j] = load_exponent(exponents + t);
        }
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int i = begin + j * kConsumers, t = i >> 3;
        if (i < pieces) {
          sts128((s.sums + sum_offset(t)) ^ ((i & 7) * 16), make_uint4(0, 0, 0, 0));
          const float by = p.factor * scaling_back(exponent[j]);
          u16* out = p.out + static_cast<u64>(static_cast<u32>(first + t)) *
                                 static_cast<u32>(p.weights.rows);
          *reinterpret_cast<uint4*>(out + job.tile * 64 + (i & 7) * 8) =
              make_uint4(scaled(v[j].x, by), scaled(v[j].y, by), scaled(v[j].z, by),
                         scaled(v[j].w, by));
        }
      }
    }
  }

  // A warpgroup's row tiles interleave (hopper/layout.py, _row_order): of a token this tile has two
  // outputs of 2 * kLayoutTiles at a time. A warp writes them all at once, so that no line of
  // memory is written to more often than it must be.
  __device__ __forceinline__ void write_pieces(const Job& job, int first, int count,
                                               u32 exponents) {
    constexpr int kAtOnce = 8, kWarps = kConsumers / 32;
    u16* out = p.out + static_cast<u64>(first) * p.weights.rows +
               job.tile / kLayoutTiles * kLayoutTiles * 64 + job.tile % kLayoutTiles * 2 +
               lane * 2 * kLayoutTiles;
    for (int begin = wg * 4 + warp; begin < count; begin += kAtOnce * kWarps) {
      u32 v[kAtOnce], exponent[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int t = begin + j * kWarps;
        if (t < count) {
          v[j] = lds32((s.sums + sum_offset(t)) ^ (lane * 4));
          exponent[j] = load_exponent(exponents + t);
        }
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int t = begin + j * kWarps;
        if (t < count) {
          sts32((s.sums + sum_offset(t)) ^ (lane * 4), 0);
          *reinterpret_cast<u32*>(out + static_cast<u64>(t) * p.weights.rows) =
              scaled(v[j], p.factor * scaling_back(exponent[j]));
        }
      }
    }
  }

  __device__ __forceinline__ static u32 scaled(u32 halves, float by) {
    return pack_bf16(half_low(halves) * by, half_high(halves) * by);
  }

  __device__ __forceinline__ void consume() {
    for (u32 i = threadIdx.x; i < (kMostTokens + kNobody) * 8; i += kConsumers) {
      sts128(s.sums + i * 16, make_uint4(0, 0, 0, 0));
    }
    named_sync(1, kConsumers);
    u32 number = 0;  // steps of the jobs before
    int own = wg;    // next step of this warpgroup, in the job
    for (int n = 0;; ++n) {
      barrier_wait(s.table_full(n & 1), n >> 1 & 1);
      const Job& job = *s.job(n & 1);
      const int all = job.steps;
      const bool twice = job.twice != 0;
      if (all < 0) return;
      const Step* steps = s.steps(n & 1) + job.first;
      unit = job.unit * 512.0f;
      if (own < all) load(number + own);
      for (; own < all; own += kWgs) {
        take(steps[own], number + own, own + kWgs < all, twice);
      }
      own -= all, number += all;
      finish(n);
      __syncwarp();
      if (kEveryLane || lane == 0) barrier_arrive(s.table_empty(n & 1));
    }
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, 1)
#if W4_CLUSTER > 1
__cluster_dims__(W4_CLUSTER, 1, 1)
#endif
    w4a8_prefill_own_down(const __grid_constant__ PrefillOwnParams p) {
  extern __shared__ __align__(128) u8 shared[];
  const Shared s = Shared::of(shared, p.max_steps);
  if (threadIdx.x == 0) s.set_up();
  __syncthreads();
  if constexpr (kCluster > 1) cluster_sync();
  pdl_wait();
  pdl_trigger();
  const u32 rank = blockIdx.x % kCluster;
  if (threadIdx.x >= kConsumers) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 48;");
    const int warp = (threadIdx.x - kConsumers) >> 5;
    if (warp == 0) {
      describe_jobs(p, s, rank);
    } else if (warp <= kWeightWarps) {
      produce_weights(p, s, rank, warp - 1);
    } else if (warp <= kWeightWarps + kTokenWarps) {
      produce_tokens(p, s, warp - 1 - kWeightWarps);
    }
  } else {
    // What the launch gave and producers gave back: 640 threads of 96, or 768 of 80.
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kWgs == 4 ? 96 : 128));
    const int thread = threadIdx.x & 127;
    OwnBody body{p, s, rank, uniform(static_cast<int>(threadIdx.x >> 7)), uniform(thread >> 5),
                 kept(thread & 31), kept(static_cast<u32>(thread) * 16),
                 kept(kTileBytes + static_cast<u32>(thread & ~3)),
                 kept(unknown_zero(p)), 0, 0.0f, {}, {}};
    body.consume();
  }
  __syncwarp();
  if constexpr (kCluster > 1) cluster_sync();  // others may still write or arrive here
}
