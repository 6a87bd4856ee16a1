// Small batches, second of two kernels: w2 and the sum over experts.
//
// A CTA owns 64 rows of the output for all experts and tokens, so nothing is added across CTAs and
// the order of addition is that of the slots. Its two warpgroups take alternate slots.
// W4_K, W4_TILES, W4_TOKENS, W4_GROUP, W4_MINUS_EIGHT: Shape in tile_math.cuh, with the whole K in
// one stage; a "row tile" of a stage is the same 64 rows of another expert.
#include "slots.cuh"
#include "tile_math.cuh"

using S = Shape<W4_K, W4_TILES, W4_TOKENS, W4_GROUP, W4_MINUS_EIGHT != 0, true>;
constexpr int kConsumers = 256;
constexpr int kStageSlots = 2 * S::kTiles;
constexpr int kWeightBytes = kStageSlots * S::kTileBytes;
constexpr int kScaleBytes = kStageSlots * S::kTileScaleBytes;
constexpr int kTokenBytes = S::kTokens * S::kK;
constexpr int kStageBytes = kWeightBytes + kScaleBytes + kStageSlots * kTokenBytes;

struct SmallDownParams {
  const u8* w;            // (E, rows, K / 2) in stage order
  const u8* scales;       // (E, rows, K / group) bfloat16 in stage order
  const u8* b;            // (slots, W4_TOKENS * K) E4M3 as token operands
  const float* b_scale;   // (1) static or (slots, W4_TOKENS) dynamic
  const float* weights;   // (M, top_k)
  u16* out;               // (M, rows) bfloat16
  Batch batch;
  float factor;
  int rows, ring, dynamic;
};

extern "C" __global__ void __launch_bounds__(kConsumers + 32, 1)
    w4a8_small_down(const __grid_constant__ SmallDownParams p) {
  extern __shared__ __align__(128) u8 shared[];
  __shared__ Slots slots;
  __shared__ float share[kMaxPairs][S::kTokens];   // combine weight x activation scale x 512
  __shared__ float pair_weight[kMaxPairs];
  __shared__ float other[S::kAcc][128];
  const int tid = threadIdx.x, lane = tid & 31;
  const u32 ring = smem_address(shared), bars = ring + p.ring * kStageBytes;
  if (tid == 0) {
    for (int i = 0; i < p.ring; ++i) {
      barrier_init(bars + i * 16, 2);
      barrier_init(bars + i * 16 + 8, kConsumers / 32 * kLanes);
    }
    barrier_init_fence();
  }
  pdl_trigger();
  // The kernel before this one started only after ids and weights were written.
  for (int i = tid; i < p.batch.tokens * p.batch.top_k; i += blockDim.x) {
    pair_weight[i] = p.weights[i];
  }
  find_slots(p.batch, slots);
  const int row_tile = blockIdx.x, count = slots.count;
  const int stages = (count + kStageSlots - 1) / kStageSlots;

  if (tid >= kConsumers) {
    const u64 policy = evict_first_policy();
    const u64 w_expert = static_cast<u64>(p.rows) * (S::kK / 2);
    const u64 s_expert = static_cast<u64>(p.rows) * S::kGroups * 2;
    auto copy = [&](int n, int at, bool weights) {
      const u32 full = bars + at * 16, stage = ring + at * kStageBytes;
      const int here = min(kStageSlots, count - n * kStageSlots);
      const u32 per_slot = weights ? S::kTileBytes + S::kTileScaleBytes : kTokenBytes;
      if (lane == 0) barrier_expect(full, here * per_slot);
      __syncwarp();
      if (lane >= here) return;
      const int slot = n * kStageSlots + lane;
      if (weights) {
        const u64 expert = slots.expert[slot];
        bulk_copy(stage + lane * S::kTileBytes,
                  p.w + expert * w_expert + static_cast<u64>(row_tile) * S::kTileBytes,
                  S::kTileBytes, full, policy);
        bulk_copy(stage + kWeightBytes + lane * S::kTileScaleBytes,
                  p.scales + expert * s_expert + static_cast<u64>(row_tile) * S::kTileScaleBytes,
                  S::kTileScaleBytes, full, policy);
      } else {
        bulk_copy(stage + kWeightBytes + kScaleBytes + lane * kTokenBytes,
                  p.b + static_cast<u64>(slot) * kTokenBytes, kTokenBytes, full);
      }
    };
    const int early = min(p.ring, stages);
    for (int n = 0; n < early; ++n) copy(n, n, true);
    pdl_wait();
    int at = 0;
    u32 phase = 0;
    for (int n = 0; n < stages; ++n) {
      if (n >= p.ring) {
        barrier_wait(bars + at * 16 + 8, phase ^ 1);
        copy(n, at, true);
      }
      copy(n, at, false);
      if (++at == p.ring) at = 0, phase ^= 1;
    }
    return;
  }

  const int thread = tid & 127, group = tid >> 7;
  for (int i = tid; i < count * S::kTokens; i += kConsumers) (&share[0][0])[i] = 0.0f;
  const float b_scale = p.dynamic ? 512.0f : 512.0f * *p.b_scale;
  named_sync(3, kConsumers);
  if (tid < p.batch.tokens) {  // one thread per token: a repeated expert adds up in k order
    for (int k = 0; k < p.batch.top_k; ++k) {
      const int pair = tid * p.batch.top_k + k, e = slots.id[pair];
      if (e >= 0) share[slot_of(slots, e)][tid] += pair_weight[pair] * b_scale;
    }
  }
  pdl_wait();
  named_sync(3, kConsumers);
  if (p.dynamic) {
    for (int i = tid; i < count * S::kTokens; i += kConsumers) {
      if (i % S::kTokens < p.batch.tokens) (&share[0][0])[i] *= p.b_scale[i];
    }
    named_sync(3, kConsumers);
  }

  const u32 w_at = group * S::kTiles * S::kTileBytes + thread * 16;
  const u32 s_at = kWeightBytes + group * S::kTiles * S::kTileScaleBytes +
                   ((thread >> 5) * 8 + (lane >> 2)) * 4;
  const int c0 = (lane & 3) * 2;
  float sum[S::kAcc], acc[S::kAcc];
#pragma unroll
  for (int i = 0; i < S::kAcc; ++i) sum[i] = 0.0f;
  int at = 0;
  u32 phase = 0;
#pragma unroll 1
  for (int n = 0; n < stages; ++n) {
    const u32 full = bars + at * 16, stage = ring + at * kStageBytes;
    const int slot0 = n * kStageSlots + group * S::kTiles;
    barrier_wait(full, phase);
    const u64 b = token_descriptor(
        stage + kWeightBytes + kScaleBytes + group * S::kTiles * kTokenBytes, S::kK * 8);
    stage_math<S>(acc, stage + w_at, stage + s_at, b, kTokenBytes / 16,
                  [&](int i, float(&part)[S::kAcc]) {
                    if (slot0 + i >= count) return;  // stale shared memory
#pragma unroll
                    for (int j = 0; j < S::kAcc; j += 4) {
                      const float* column = &share[slot0 + i][j * 2 + c0];
                      sum[j] += part[j] * column[0], sum[j + 1] += part[j + 1] * column[1];
                      sum[j + 2] += part[j + 2] * column[0], sum[j + 3] += part[j + 3] * column[1];
                    }
                  });
    __syncwarp();
    if (kEveryLane || lane == 0) barrier_arrive(full + 8);
    if (++at == p.ring) at = 0, phase ^= 1;
  }

  if (group == 1) {
#pragma unroll
    for (int i = 0; i < S::kAcc; ++i) other[i][thread] = sum[i];
  }
  named_sync(3, kConsumers);
  if (group == 0) {
    // Row tiles of one warpgroup interleave, as the large-batch kernel wants them.
    const int in_group = ((thread >> 5) * 16 + (lane >> 2) * 2) * S::kTiles;
    const int row = row_tile / S::kTiles * S::kTiles * 64 + in_group + row_tile % S::kTiles * 2;
#pragma unroll
    for (int i = 0; i < S::kAcc; i += 4) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int t = i * 2 + c0 + h;
        if (t >= p.batch.tokens) continue;
        *reinterpret_cast<u32*>(p.out + static_cast<u64>(t) * p.rows + row) =
            pack_bf16((sum[i + h] + other[i + h][thread]) * p.factor,
                      (sum[i + 2 + h] + other[i + 2 + h][thread]) * p.factor);
      }
    }
  }
}
