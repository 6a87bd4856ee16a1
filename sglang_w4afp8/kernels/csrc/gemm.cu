// The two matrix kernels of the large-batch path, from one source.
//
// W4_UP=1: gate and up rows of w13 times the tokens of each expert, SiLU(gate)*up, FP8.
// W4_UP=0: w2 times those, one BF16 row per (token, expert) pair.
// W4_K, W4_TILES, W4_TOKENS, W4_GROUP, W4_MINUS_EIGHT: Shape in tile_math.cuh.
//
// A work unit is (tile of tokens, block of 2 * W4_TILES row tiles); its stages run along K. The
// stages of all units form one list and each CTA takes an equal run of it (W4_UP=0: whole units).
// A unit cut by a run's end is finished by whichever CTA is last, in a fixed order of addition.
#include "tile_math.cuh"
#include "units.cuh"

using S = Shape<W4_K, W4_TILES, W4_TOKENS, W4_GROUP, W4_MINUS_EIGHT != 0, (W4_TILES > 1)>;
constexpr bool kUp = W4_UP != 0;
constexpr int kConsumers = 256;
constexpr int kBlockTiles = 2 * S::kTiles;
constexpr int kWeightBytes = kBlockTiles * S::kTileBytes;
constexpr int kScaleBytes = kBlockTiles * S::kTileScaleBytes;
constexpr int kTokenBytes = S::kTokens * S::kK;
constexpr int kStageBytes = kWeightBytes + kScaleBytes + kTokenBytes;
constexpr int kToken8Stride = S::kK * 8;

struct GemmParams {
  const u8* w;            // (E, rows, K / 2) in stage order, see hopper/layout.py
  const u8* scales;       // (E, rows, K / group) bfloat16 in stage order
  const u8* b;            // E4M3 rows: up (M, K), down (M * top_k, K)
  const int* header;      // [0] number of tiles
  const int4* tiles;      // {expert, first, tokens, 0}
  const int* sorted;      // pair numbers
  const float* b_scale;   // up: (M); down: (1) static or (M * top_k) dynamic
  const float* q_scale;   // up: (1) static scale of the output, or null: per row, from the row
  u8* q;                  // up: (M * top_k, inner) E4M3
  float* q_row_scale;     // up, dynamic: (M * top_k)
  float* inner;           // up, dynamic: (M * top_k, inner) before quantisation
  u16* y;                 // down: (M * top_k, rows) bfloat16
  Join join;              // up: units cut by a run's end
  u32* tile_count;        // up, dynamic: (tiles), zero between launches
  int rows, k, blocks, top_k, ring, dynamic;
};

struct Unit {
  int tile, block;
};
__device__ __forceinline__ Unit unit_of(const GemmParams& p, int unit) {
  return {unit / p.blocks, unit % p.blocks};
}

__device__ void produce(const GemmParams& p, u32 ring, u32 bars, int first, int last) {
  const int lane = threadIdx.x & 31;
  const u64 policy = evict_first_policy();
  const u64 w_expert = static_cast<u64>(p.rows) * (p.k / 2);
  const u64 s_expert = static_cast<u64>(p.rows) * (p.k / S::kGroup) * 2;
  int expert = -1, row_tiles = 0;
  auto copy_weights = [&](int n, int slot) {  // one lane
    const int unit = n / p.join.stages_per_unit, step = n - unit * p.join.stages_per_unit;
    const Unit u = unit_of(p, unit);
    expert = p.tiles[u.tile].x;
    row_tiles = min(kBlockTiles, p.rows / 64 - u.block * kBlockTiles);
    const u32 full = bars + slot * 16, stage = ring + slot * kStageBytes;
    const u32 wb = row_tiles * S::kTileBytes, sb = row_tiles * S::kTileScaleBytes;
    const u64 before = static_cast<u64>(u.block) * kBlockTiles * p.join.stages_per_unit +
                       static_cast<u64>(step) * row_tiles;
    barrier_expect(full, wb + sb);
    bulk_copy(stage, p.w + expert * w_expert + before * S::kTileBytes, wb, full, policy);
    bulk_copy(stage + kWeightBytes, p.scales + expert * s_expert + before * S::kTileScaleBytes, sb,
              full, policy);
  };
  // The down kernel's weights do not depend on the kernel before it: start them before the wait.
  const int early = kUp ? 0 : min(p.ring, last - first);
  if (!kUp) {
    if (lane == 0) {
      for (int i = 0; i < early; ++i) copy_weights(first + i, i);
    }
    __syncwarp();
    pdl_wait();
  }

  const u8* row[S::kTokens / 8];
  int tile = -1, tokens = 0, slot = 0;
  u32 phase = 0;
  for (int n = first; n < last; ++n) {
    const int unit = n / p.join.stages_per_unit, step = n - unit * p.join.stages_per_unit;
    const Unit u = unit_of(p, unit);
    if (u.tile != tile) {
      tile = u.tile;
      const int4 t = p.tiles[tile];
      tokens = t.z;
#pragma unroll
      for (int j = 0; j < S::kTokens / 8; ++j) {
        const int c = j * 8 + (lane & 7);
        const int pair = c < tokens ? p.sorted[t.y + c] : 0;
        row[j] = p.b + static_cast<u64>(kUp ? pair / p.top_k : pair) * p.k + (lane >> 3) * 16;
      }
    }
    const u32 full = bars + slot * 16;
    if (n - first >= p.ring) barrier_wait(full + 8, phase ^ 1);
    if (n - first >= early) {
      if (lane == 0) copy_weights(n, slot);
      __syncwarp();
    }
    // 8 tokens x 4 pieces of 16 bytes per instruction: conflict-free writes, 64-byte reads.
    const u32 dst = ring + slot * kStageBytes + kWeightBytes + kScaleBytes + (lane >> 3) * 128 +
                    (lane & 7) * 16;
#pragma unroll
    for (int j = 0; j < S::kTokens / 8; ++j) {
      if (j * 8 + (lane & 7) < tokens) {
#pragma unroll
        for (int i = 0; i < S::kK / 64; ++i) {
          async_copy16(dst + j * kToken8Stride + i * 512, row[j] + step * S::kK + i * 64);
        }
      }
    }
    async_copy_arrive(full);
    if (++slot == p.ring) slot = 0, phase ^= 1;
  }
}

__device__ void finish_up(const GemmParams& p, float (&acc)[S::kAcc], int4 tile, int tile_number,
                          int row_tile, u32* flag) {
  const int thread = threadIdx.x & 127, group = threadIdx.x >> 7;
  const int g = (thread & 31) >> 2, c0 = (thread & 3) * 2;
  const int width = p.rows / 2, f = row_tile * 32 + (thread >> 5) * 8 + g;
  const float q_scale = p.dynamic ? 1.0f : *p.q_scale;
#pragma unroll
  for (int i = 0; i < S::kAcc; i += 4) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int c = i * 2 + c0 + h;
      if (c >= tile.z) continue;
      const int pair = p.sorted[tile.y + c];
      const float scale = p.b_scale[pair / p.top_k] * 512.0f;
      const float v = silu_mul(acc[i + h] * scale, acc[i + 2 + h] * scale);
      const u64 at = static_cast<u64>(pair) * width + f;
      if (p.dynamic) {
        p.inner[at] = v;
      } else {
        p.q[at] = static_cast<u8>(pack_e4m3(__fdiv_rn(v, q_scale), 0.0f));
      }
    }
  }
  if (p.dynamic && last_to_arrive(p.tile_count + tile_number, p.rows / 64, group, flag)) {
    for (int c = thread >> 5; c < tile.z; c += 4) {
      const u64 pair = p.sorted[tile.y + c];
      u8* q = p.q + pair * width;
      const float row_scale = quantize_row(p.inner + pair * width, width, [&](int i, u32 four) {
        *reinterpret_cast<u32*>(q + i) = four;
      });
      if ((thread & 31) == 0) p.q_row_scale[pair] = row_scale;
    }
  }
}

__device__ __forceinline__ void finish_down(const GemmParams& p, float (&acc)[S::kAcc], int4 tile,
                                            int row_tile) {
  const int thread = threadIdx.x & 127;
  const int g = (thread & 31) >> 2, c0 = (thread & 3) * 2;
  const int row = row_tile * 64 + (thread >> 5) * 16 + g * 2;
#pragma unroll
  for (int i = 0; i < S::kAcc; i += 4) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int c = i * 2 + c0 + h;
      if (c >= tile.z) continue;
      const int pair = p.sorted[tile.y + c];
      const float scale = p.b_scale[p.dynamic ? pair : 0] * 512.0f;
      *reinterpret_cast<u32*>(p.y + static_cast<u64>(pair) * p.rows + row) =
          pack_bf16(acc[i + h] * scale, acc[i + 2 + h] * scale);
    }
  }
}

__device__ __forceinline__ void consume(const GemmParams& p, u32 ring, u32 bars, int first,
                                        int last, long long total, int ctas, u32* flag) {
  const int thread = threadIdx.x & 127, group = threadIdx.x >> 7, lane = threadIdx.x & 31;
  const u32 w_at = group * S::kTiles * S::kTileBytes + thread * 16;
  const u32 s_at = kWeightBytes + group * S::kTiles * S::kTileScaleBytes +
                   ((thread >> 5) * 8 + (lane >> 2)) * 4;
  float acc[S::kAcc];
  int slot = 0;
  u32 phase = 0;
  for (int n = first; n < last;) {
    const int unit = n / p.join.stages_per_unit, step = n - unit * p.join.stages_per_unit;
    const int steps = min(p.join.stages_per_unit - step, last - n);
    const Unit u = unit_of(p, unit);
    const int4 tile = p.tiles[u.tile];
    const int row_tile = (u.block * 2 + group) * S::kTiles;
    auto finish = [&](int t, float(&sum)[S::kAcc]) {
      if constexpr (!kUp) {
        if (row_tile + t < p.rows / 64) finish_down(p, sum, tile, row_tile + t);
      }
    };
#pragma unroll
    for (int i = 0; i < S::kAcc; ++i) acc[i] = 0.0f;
#pragma unroll 1
    for (int i = 0; i < steps; ++i) {
      const u32 full = bars + slot * 16, stage = ring + slot * kStageBytes;
      barrier_wait(full, phase);
      fence_async_proxy();
      stage_math<S>(acc, stage + w_at, stage + s_at,
                    token_descriptor(stage + kWeightBytes + kScaleBytes, kToken8Stride), 0, finish);
      __syncwarp();
      if (lane == 0) barrier_arrive(full + 8);
      if (++slot == p.ring) slot = 0, phase ^= 1;
    }
    n += steps;
    if constexpr (kUp) {
      const bool whole = steps == p.join.stages_per_unit;
      const bool valid = row_tile < p.rows / 64;
      if (whole || join_parts(p.join, acc, total, ctas, unit, step == 0, flag)) {
        if (valid) finish_up(p, acc, tile, u.tile, row_tile, flag);
      }
    } else if constexpr (S::kTiles == 1) {
      finish(0, acc);
    }
  }
}

extern "C" __global__ void __launch_bounds__(kConsumers + 32, S::kTokens <= 16 ? 2 : 1)
    w4a8_gemm(const __grid_constant__ GemmParams p) {
  extern __shared__ __align__(128) u8 shared[];
  __shared__ u32 flags[2];
  const u32 ring = smem_address(shared), bars = ring + p.ring * kStageBytes;
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.ring; ++i) {
      barrier_init(bars + i * 16, 1 + 32);              // the bulk copies, and a warp's own
      barrier_init(bars + i * 16 + 8, kConsumers / 32);
    }
    barrier_init_fence();
  }
  __syncthreads();
  // Up: the kernel after this one reads the tile list before its own wait, so it may start only
  // when the kernel that wrote the list is known to be done.
  if (kUp) pdl_wait();
  pdl_trigger();
  const int units = p.header[0] * p.blocks;
  const long long total = static_cast<long long>(units) * p.join.stages_per_unit;
  const int ctas = total < gridDim.x ? static_cast<int>(total) : gridDim.x;
  const int cta = blockIdx.x;
  if (cta < ctas) {
    int first, last;
    if (kUp) {
      first = static_cast<int>(run_start(total, cta, ctas));
      last = static_cast<int>(run_start(total, cta + 1, ctas));
    } else {
      first = static_cast<int>(run_start(units, cta, ctas)) * p.join.stages_per_unit;
      last = static_cast<int>(run_start(units, cta + 1, ctas)) * p.join.stages_per_unit;
    }
    if (threadIdx.x >= kConsumers) {
      produce(p, ring, bars, first, last);
    } else {
      if (!kUp) pdl_wait();
      consume(p, ring, bars, first, last, total, ctas, flags + (threadIdx.x >> 7));
    }
  }
}
