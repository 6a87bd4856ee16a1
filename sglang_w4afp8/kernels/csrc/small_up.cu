// Small batches, first of two kernels: FP8 of x, gate and up rows of w13, SiLU(gate)*up, FP8.
//
// The tokens, quantised by each CTA itself, stay in shared memory for all of its work; only weights
// stream. Units, stages and runs are those of gemm.cu with a slot in the place of a token tile.
// W4_K, W4_TOKENS, W4_GROUP, W4_MINUS_EIGHT: Shape in tile_math.cuh.
#include "slots.cuh"
#include "tile_math.cuh"
#include "units.cuh"

using S = Shape<W4_K, 1, W4_TOKENS, W4_GROUP, W4_MINUS_EIGHT != 0, false>;
constexpr int kConsumers = 256;
constexpr int kWeightBytes = 2 * S::kTileBytes;
constexpr int kScaleBytes = 2 * S::kTileScaleBytes;
constexpr int kStageBytes = kWeightBytes + kScaleBytes;

struct SmallUpParams {
  const u8* w;            // (E, rows, K / 2) in stage order
  const u8* scales;       // (E, rows, K / group) bfloat16 in stage order
  const u16* x;           // (M, K) bfloat16
  const float* a_scale;   // (1) static scale of x, or null: amax of the row / 448
  const float* q_scale;   // (1) static scale of the output, or null
  u8* q;                  // (slots, W4_TOKENS * inner) E4M3 as a token operand
  float* q_row_scale;     // dynamic: (slots, W4_TOKENS)
  float* inner;           // dynamic: (slots, W4_TOKENS, inner) before quantisation
  Join join;
  u32* slot_count;        // dynamic: (slots), zero between launches
  Batch batch;
  int rows, k, blocks, ring, dynamic;
};

// Where column i of token t lies in a token operand of `width` columns (mma.cuh).
__device__ __forceinline__ u32 token_offset(int t, int i, int width) {
  return (t >> 3) * width * 8 + (i >> 4) * 128 + (t & 7) * 16 + (i & 15);
}

// Puts the tokens' columns of all stages in [first, last) into shared memory as E4M3.
__device__ __forceinline__ void load_tokens(const SmallUpParams& p, u8* tokens, float* scales,
                                            float (*amaxes)[kConsumers / 32], int first,
                                            int last) {
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, vectors = p.k / 8;
  constexpr int kAtOnce = 8;
  const uint4* x = reinterpret_cast<const uint4*>(p.x);
  if (p.dynamic) {
    for (int t = 0; t < p.batch.tokens; ++t) {
      float amax = 0.0f;
#pragma unroll 4
      for (int i = tid; i < vectors; i += kConsumers) amax = largest8(amax, x[t * vectors + i]);
      for (int d = 16; d; d >>= 1) amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, d));
      if (lane == 0) amaxes[t][warp] = amax;
    }
    named_sync(3, kConsumers);
    if (tid < p.batch.tokens) {
      float amax = 0.0f;
      for (int w = 0; w < kConsumers / 32; ++w) amax = fmaxf(amax, amaxes[tid][w]);
      scales[tid] = row_scale(amax);
    }
    named_sync(3, kConsumers);
  }
  // A run shorter than a unit needs part of K only, perhaps its end and its beginning.
  const int per_unit = p.join.stages_per_unit, per_stage = S::kK / 8;
  const int wanted = min(per_unit, last - first) * per_stage, begin = first % per_unit * per_stage;
  for (int j = tid; j < wanted * p.batch.tokens; j += kConsumers * kAtOnce) {
    uint4 v[kAtOnce];
    int token[kAtOnce], at[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int item = min(j + i * kConsumers, wanted * p.batch.tokens - 1);
      token[i] = item / wanted;
      at[i] = begin + (item - token[i] * wanted);
      if (at[i] >= vectors) at[i] -= vectors;
      v[i] = x[token[i] * vectors + at[i]];
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const float scale = scales[token[i]];
      *reinterpret_cast<uint2*>(tokens + token_offset(token[i], at[i] * 8, p.k)) =
          quantize8(v[i], scale, __frcp_rn(scale));
    }
  }
  fence_async_proxy();
  named_sync(3, kConsumers);
}

__device__ void produce(const SmallUpParams& p, const Slots& slots, u32 ring, u32 bars, int first,
                        int last) {
  const u64 policy = evict_first_policy();
  const u64 w_expert = static_cast<u64>(p.rows) * (p.k / 2);
  const u64 s_expert = static_cast<u64>(p.rows) * (p.k / S::kGroup) * 2;
  int slot = 0;
  u32 phase = 0;
  for (int n = first; n < last; ++n) {
    const int unit = n / p.join.stages_per_unit, step = n - unit * p.join.stages_per_unit;
    const int block = unit % p.blocks, expert = slots.expert[unit / p.blocks];
    const int row_tiles = min(2, p.rows / 64 - block * 2);
    const u64 before = static_cast<u64>(block) * 2 * p.join.stages_per_unit + step * row_tiles;
    const u32 full = bars + slot * 16, stage = ring + slot * kStageBytes;
    const u32 wb = row_tiles * S::kTileBytes, sb = row_tiles * S::kTileScaleBytes;
    if (n - first >= p.ring) barrier_wait(full + 8, phase ^ 1);
    barrier_expect(full, wb + sb);
    bulk_copy(stage, p.w + expert * w_expert + before * S::kTileBytes, wb, full, policy);
    bulk_copy(stage + kWeightBytes, p.scales + expert * s_expert + before * S::kTileScaleBytes, sb,
              full, policy);
    if (++slot == p.ring) slot = 0, phase ^= 1;
  }
}

__device__ void finish_up(const SmallUpParams& p, float (&acc)[S::kAcc], int slot, int row_tile,
                          const float* scales, float q_scale, u32* flag) {
  const int thread = threadIdx.x & 127, group = threadIdx.x >> 7;
  const int g = (thread & 31) >> 2, c0 = (thread & 3) * 2;
  const int width = p.rows / 2, f = row_tile * 32 + (thread >> 5) * 8 + g;
  u8* q = p.q + static_cast<u64>(slot) * S::kTokens * width;
  float* inner = p.inner + static_cast<u64>(slot) * S::kTokens * width;
#pragma unroll
  for (int i = 0; i < S::kAcc; i += 4) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int t = i * 2 + c0 + h;
      if (t >= p.batch.tokens) continue;
      const float scale = scales[t] * 512.0f;
      const float v = silu_mul(acc[i + h] * scale, acc[i + 2 + h] * scale);
      if (p.dynamic) {
        inner[t * width + f] = v;
      } else {
        q[token_offset(t, f, width)] = static_cast<u8>(pack_e4m3(__fdiv_rn(v, q_scale), 0.0f));
      }
    }
  }
  if (p.dynamic && last_to_arrive(p.slot_count + slot, p.rows / 64, group, flag)) {
    for (int t = thread >> 5; t < p.batch.tokens; t += 4) {
      const float row_scale = quantize_row(inner + t * width, width, [&](int i, u32 four) {
        *reinterpret_cast<u32*>(q + token_offset(t, i, width)) = four;
      });
      if ((thread & 31) == 0) p.q_row_scale[slot * S::kTokens + t] = row_scale;
    }
  }
}

extern "C" __global__ void __launch_bounds__(kConsumers + 32, 1)
    w4a8_small_up(const __grid_constant__ SmallUpParams p) {
  extern __shared__ __align__(128) u8 shared[];
  __shared__ Slots slots;
  __shared__ float scales[S::kTokens], amaxes[S::kTokens][kConsumers / 32];
  __shared__ u32 flags[2];
  u8* tokens = shared;
  const u32 ring = smem_address(shared) + S::kTokens * p.k, bars = ring + p.ring * kStageBytes;
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.ring; ++i) {
      barrier_init(bars + i * 16, 1);
      barrier_init(bars + i * 16 + 8, kConsumers / 32 * kLanes);
    }
    barrier_init_fence();
  }
  const bool consumer = threadIdx.x < kConsumers;
  const float a_scale = p.dynamic ? 1.0f : *p.a_scale;
  const float q_scale = p.dynamic ? 1.0f : *p.q_scale;
  pdl_wait();
  pdl_trigger();  // the next kernel reads ids and weights before its own wait: they are there
  // One short batch with a static scale: its loads are on their way while the slots are found.
  constexpr int kAhead = 4;
  const int vectors = p.batch.tokens * (p.k / 8);
  const bool ahead = !p.dynamic && vectors <= kAhead * kConsumers;
  uint4 held[kAhead];
  if (ahead && consumer) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int at = threadIdx.x + i * kConsumers;
      held[i] = at < vectors ? reinterpret_cast<const uint4*>(p.x)[at] : make_uint4(0, 0, 0, 0);
    }
  }
  if (threadIdx.x < p.batch.tokens && !p.dynamic) scales[threadIdx.x] = a_scale;
  find_slots(p.batch, slots);
  const int per_unit = p.join.stages_per_unit;
  const long long total = static_cast<long long>(slots.count) * p.blocks * per_unit;
  const int ctas = total < gridDim.x ? static_cast<int>(total) : gridDim.x;
  const int cta = blockIdx.x;
  if (cta >= ctas) return;
  const int first = static_cast<int>(run_start(total, cta, ctas));
  const int last = static_cast<int>(run_start(total, cta + 1, ctas));
  if (!consumer) {
    if (threadIdx.x == kConsumers) produce(p, slots, ring, bars, first, last);
    return;
  }

  if (ahead) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int at = threadIdx.x + i * kConsumers, t = at / (p.k / 8);
      if (at < vectors) {
        *reinterpret_cast<uint2*>(tokens + token_offset(t, (at - t * (p.k / 8)) * 8, p.k)) =
            quantize8(held[i], a_scale, __frcp_rn(a_scale));
      }
    }
    fence_async_proxy();
    named_sync(3, kConsumers);
  } else {
    load_tokens(p, tokens, scales, amaxes, first, last);
  }
  const int thread = threadIdx.x & 127, group = threadIdx.x >> 7, lane = threadIdx.x & 31;
  const u32 w_at = group * S::kTileBytes + thread * 16;
  const u32 s_at = kWeightBytes + group * S::kTileScaleBytes +
                   ((thread >> 5) * 8 + (lane >> 2)) * 4;
  float acc[S::kAcc];
  int slot = 0;
  u32 phase = 0;
  for (int n = first; n < last;) {
    const int unit = n / per_unit, step = n - unit * per_unit;
    const int steps = min(per_unit - step, last - n);
#pragma unroll
    for (int i = 0; i < S::kAcc; ++i) acc[i] = 0.0f;
#pragma unroll 1
    for (int i = 0; i < steps; ++i) {
      const u32 full = bars + slot * 16, stage = ring + slot * kStageBytes;
      barrier_wait(full, phase);
      const u32 b = smem_address(tokens) + (step + i) * S::kK * 8;
      stage_math<S>(acc, stage + w_at, stage + s_at, token_descriptor(b, p.k * 8), 0,
                    [](int, float(&)[S::kAcc]) {});
      __syncwarp();
      if (kEveryLane || lane == 0) barrier_arrive(full + 8);
      if (++slot == p.ring) slot = 0, phase ^= 1;
    }
    n += steps;
    const int row_tile = unit % p.blocks * 2 + group;
    u32* flag = flags + group;
    if (steps == per_unit || join_parts(p.join, acc, total, ctas, unit, step == 0)) {
      if (row_tile < p.rows / 64) {
        finish_up(p, acc, unit / p.blocks, row_tile, scales, q_scale, flag);
      }
    }
  }
}
