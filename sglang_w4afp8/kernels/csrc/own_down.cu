// w2 and the sum over experts for medium batches, in one kernel.
//
// A CTA owns 64 columns of the output for all tokens: it reads those 64 rows of w2 of every expert
// that was chosen, and adds each pair's result, times its combine weight, to its token's sum in
// shared memory. Two warpgroups take alternate tiles, each with sums of its own that meet at the
// end, so the order of addition is fixed. Nothing but the output is written to memory.
// W4_K, W4_TILES, W4_TOKENS, W4_GROUP, W4_MINUS_EIGHT: Shape in tile_math.cuh, with the whole K in
// one stage; a "row tile" of a stage is the same 64 rows for another token tile.
#include "tile_math.cuh"

using S = Shape<W4_K, W4_TILES, W4_TOKENS, W4_GROUP, W4_MINUS_EIGHT != 0, true>;
constexpr int kConsumers = 256;
constexpr int kStageTiles = 2 * S::kTiles;
constexpr int kWeightBytes = kStageTiles * S::kTileBytes;
constexpr int kScaleBytes = kStageTiles * S::kTileScaleBytes;
constexpr int kTokenBytes = S::kTokens * S::kK;
constexpr int kStageBytes = kWeightBytes + kScaleBytes + kStageTiles * kTokenBytes;
constexpr int kColumns = S::kAcc / 2;
constexpr u32 kNone = 0xffff;

struct OwnDownParams {
  const u8* w;             // (E, rows, K / 2) in stage order
  const u8* scales;        // (E, rows, K / group) bfloat16 in stage order
  const u8* b;             // (M * top_k, K) E4M3
  const int* header;       // [0] number of tiles, [1] whether a token may name an expert twice
  const int* tile_expert;  // (tiles)
  const int* columns;      // (tiles, W4_TOKENS) pair numbers, or -1
  const float* b_scale;    // (1) static or (M * top_k) dynamic
  const float* weights;    // (M, top_k)
  u16* out;                // (M, rows) bfloat16
  float factor;
  int rows, tokens, top_k, max_tiles, ring, dynamic;
};

// Shared memory after the ring and its barriers.
struct Tables {
  float* sums;    // (2 warpgroups, M, 64)
  float* weight;  // (pairs) combine weight x activation scale x 512
  u16* column;    // (tiles, W4_TOKENS) pair or kNone
  u16* expert;    // (tiles)
};

// Where a thread keeps its two rows of token t. Warps trade places from token to token, so that the
// four tokens a warp adds to at once spread over the banks.
__device__ __forceinline__ int sum_at(int t, int warp, int g) {
  return t * 64 + ((warp ^ (t & 3)) << 4) + g * 2;
}

__device__ __forceinline__ void produce(const OwnDownParams& p, const Tables& tables, u32 ring,
                                        u32 bars, int tiles) {
  const int lane = threadIdx.x & 31, stages = (tiles + kStageTiles - 1) / kStageTiles;
  const u64 policy = evict_first_policy();
  const u64 w_expert = static_cast<u64>(p.rows) * (S::kK / 2);
  const u64 s_expert = static_cast<u64>(p.rows) * S::kGroups * 2;
  const u8* w = p.w + static_cast<u64>(blockIdx.x) * S::kTileBytes;
  const u8* scales = p.scales + static_cast<u64>(blockIdx.x) * S::kTileScaleBytes;
  auto copy_weights = [&](int n, int slot) {
    const u32 full = bars + slot * 16, stage = ring + slot * kStageBytes;
    const int here = min(kStageTiles, tiles - n * kStageTiles);
    if (lane == 0) barrier_expect(full, here * (S::kTileBytes + S::kTileScaleBytes));
    __syncwarp();
    if (lane < here) {
      const u64 expert = tables.expert[n * kStageTiles + lane];
      bulk_copy(stage + lane * S::kTileBytes, w + expert * w_expert, S::kTileBytes, full, policy);
      bulk_copy(stage + kWeightBytes + lane * S::kTileScaleBytes, scales + expert * s_expert,
                S::kTileScaleBytes, full, policy);
    }
    __syncwarp();
  };
  const int early = min(p.ring, stages);
  for (int n = 0; n < early; ++n) copy_weights(n, n);
  pdl_wait();
  int slot = 0;
  u32 phase = 0, filling = 0;
  for (int n = 0; n < stages; ++n) {
    const u32 full = bars + slot * 16;
    if (n >= early) {
      barrier_wait(full + 8, phase ^ 1);
      copy_weights(n, slot);
    }
    const u32 dst = ring + slot * kStageBytes + kWeightBytes + kScaleBytes + (lane >> 3) * 128 +
                    (lane & 7) * 16;
#pragma unroll
    for (int j = 0; j < kStageTiles * S::kTokens / 8; ++j) {
      const int column = n * kStageTiles * S::kTokens + j * 8 + (lane & 7);
      const u32 pair = column < tiles * S::kTokens ? tables.column[column] : kNone;
      if (pair != kNone) {
        const u8* row = p.b + static_cast<u64>(pair) * S::kK + (lane >> 3) * 16;
#pragma unroll
        for (int i = 0; i < S::kK / 64; ++i) {
          async_copy16(dst + j * S::kK * 8 + i * 512, row + i * 64);
        }
      }
    }
    async_copy_commit();
    if (filling != 0) {
      async_copy_wait<1>();
      fence_async_proxy();
      __syncwarp();
      if (kEveryLane || lane == 0) barrier_arrive(filling);
    }
    filling = full;
    if (++slot == p.ring) slot = 0, phase ^= 1;
  }
  async_copy_wait<0>();
  fence_async_proxy();
  __syncwarp();
  if ((kEveryLane || lane == 0) && filling != 0) barrier_arrive(filling);
}

// Adds one tile's results to its tokens' sums. With `twice` two columns may be the same token, and
// lanes take turns.
__device__ __forceinline__ void add_tile(float* sums, const Tables& tables,
                                         float (&part)[S::kAcc], int tile, u32 inverse_top_k,
                                         bool twice) {
  const int lane = threadIdx.x & 31, warp = (threadIdx.x & 127) >> 5, g = lane >> 2, q = lane & 3;
  u32 pair[kColumns];
#pragma unroll
  for (int c = 0; c < kColumns; c += 2) {
    const u32 two = *reinterpret_cast<const u32*>(
        &tables.column[tile * S::kTokens + (c >> 1) * 8 + q * 2]);
    pair[c] = two & 0xffff, pair[c + 1] = two >> 16;
  }
  float weight[kColumns];
  float2* at[kColumns];
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const u32 known = pair[c] == kNone ? 0 : pair[c];
    weight[c] = tables.weight[known];
    at[c] = reinterpret_cast<float2*>(sums + sum_at(known * inverse_top_k >> 16, warp, g));
  }
  auto add = [&](int c, float2 old) {
    const int i = (c >> 1) * 4 + (c & 1);
    *at[c] = make_float2(old.x + part[i] * weight[c], old.y + part[i + 2] * weight[c]);
  };
  __syncwarp();  // another lane may have added to the same token for the tile before
  if (!twice) {
    float2 old[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) old[c] = *at[c];
    __syncwarp();  // columns without a pair have read token 0's sums, which another lane may own
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (pair[c] != kNone) add(c, old[c]);
    }
  } else {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      for (int turn = 0; turn < 4; ++turn) {
        if (turn == q && pair[c] != kNone) add(c, *at[c]);
        __syncwarp();
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(kConsumers + 32, 1)
    w4a8_own_down(const __grid_constant__ OwnDownParams p) {
  extern __shared__ __align__(128) u8 shared[];
  const int tid = threadIdx.x, pairs = p.tokens * p.top_k;
  const u32 ring = smem_address(shared), bars = ring + p.ring * kStageBytes;
  Tables tables;
  tables.sums = reinterpret_cast<float*>(shared + p.ring * (kStageBytes + 16));
  tables.weight = tables.sums + 2 * p.tokens * 64;
  tables.column = reinterpret_cast<u16*>(tables.weight + pairs);
  tables.expert = tables.column + p.max_tiles * S::kTokens;
  if (tid == 0) {
    for (int i = 0; i < p.ring; ++i) {
      barrier_init(bars + i * 16, 1 + kLanes);  // weights and scales; tokens
      barrier_init(bars + i * 16 + 8, kConsumers / 32 * kLanes);
    }
    barrier_init_fence();
  }
  pdl_trigger();
  // The kernel before this one started only after routing and tile list were written.
  const int tiles = p.header[0];
  const bool twice = p.header[1] != 0;
  const float b_scale = p.dynamic ? 512.0f : 512.0f * *p.b_scale;
  for (int i = tid; i < tiles; i += blockDim.x) {
    tables.expert[i] = static_cast<u16>(p.tile_expert[i]);
  }
#pragma unroll 4
  for (int i = tid; i < tiles * S::kTokens; i += blockDim.x) {
    tables.column[i] = static_cast<u16>(p.columns[i]);
  }
  __syncthreads();
  if (tid >= kConsumers) {
    produce(p, tables, ring, bars, tiles);
    return;
  }

#pragma unroll 4
  for (int i = tid; i < pairs; i += kConsumers) tables.weight[i] = p.weights[i] * b_scale;
  for (int i = tid; i < 2 * p.tokens * 16; i += kConsumers) {
    reinterpret_cast<float4*>(tables.sums)[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }
  pdl_wait();
  if (p.dynamic) {
#pragma unroll 4
    for (int i = tid; i < pairs; i += kConsumers) tables.weight[i] *= p.b_scale[i];
  }
  named_sync(3, kConsumers);

  const int thread = tid & 127, group = tid >> 7, lane = tid & 31;
  const int stages = (tiles + kStageTiles - 1) / kStageTiles;
  const u32 inverse_top_k = (65536 + p.top_k - 1) / p.top_k;  // exact for these few pairs
  const u32 w_at = group * S::kTiles * S::kTileBytes + thread * 16;
  const u32 s_at = kWeightBytes + group * S::kTiles * S::kTileScaleBytes +
                   ((thread >> 5) * 8 + (lane >> 2)) * 4;
  float* sums = tables.sums + group * p.tokens * 64;
  float acc[S::kAcc];
  int slot = 0;
  u32 phase = 0;
#pragma unroll 1
  for (int n = 0; n < stages; ++n) {
    const u32 full = bars + slot * 16, stage = ring + slot * kStageBytes;
    const int tile = n * kStageTiles + group * S::kTiles;
    barrier_wait(full, phase);
    const u64 b = token_descriptor(
        stage + kWeightBytes + kScaleBytes + group * S::kTiles * kTokenBytes, S::kK * 8);
    stage_math<S>(acc, stage + w_at, stage + s_at, b, kTokenBytes / 16,
                  [&](int i, float(&part)[S::kAcc]) {
                    if (tile + i < tiles) {
                      add_tile(sums, tables, part, tile + i, inverse_top_k, twice);
                    }
                  });
    __syncwarp();
    if (kEveryLane || lane == 0) barrier_arrive(full + 8);
    if (++slot == p.ring) slot = 0, phase ^= 1;
  }
  named_sync(3, kConsumers);

  // 32 pairs of rows of a token to a warp: 128 bytes of the output at once. With several row tiles
  // in a stage of the large-batch kernel a warpgroup's tiles interleave (hopper/layout.py).
  const float* other = tables.sums + p.tokens * 64;
  for (int i = tid; i < p.tokens * 32; i += kConsumers) {
    const int t = i >> 5, warp = (i >> 3) & 3, g = i & 7, at = sum_at(t, warp, g);
    const float2 a = *reinterpret_cast<const float2*>(tables.sums + at);
    const float2 b = *reinterpret_cast<const float2*>(other + at);
    const int first = blockIdx.x / S::kTiles * S::kTiles * 64 + blockIdx.x % S::kTiles * 2;
    const int row = first + (warp * 16 + g * 2) * S::kTiles;
    *reinterpret_cast<u32*>(p.out + static_cast<u64>(t) * p.rows + row) =
        pack_bf16((a.x + b.x) * p.factor, (a.y + b.y) * p.factor);
  }
}
