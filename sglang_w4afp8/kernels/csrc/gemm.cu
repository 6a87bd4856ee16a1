// The two matrix kernels of the large-batch path, from one source.
//
// W4_UP=1: gate and up rows of w13 times the tokens of each expert, SiLU(gate)*up, FP8.
// W4_UP=0: w2 times those, one BF16 row per (token, expert) pair.
// W4_K, W4_TILES, W4_TOKENS, W4_GROUP, W4_MINUS_EIGHT: Shape in tile_math.cuh.
// W4_ROW_SCALES=1, up only: see row_scales.cuh.
//
// A work unit is (tile of tokens, block of 2 * W4_TILES row tiles); its stages run along K. The
// stages of all units form one list and each CTA takes an equal run of it (W4_UP=0: whole units).
// Weights start to stream before the kernel in front has ended: gate and up find the experts'
// order themselves, down has it from two kernels before.
#include "tile_math.cuh"
#include "tiles.cuh"
#include "units.cuh"

using S = Shape<W4_K, W4_TILES, W4_TOKENS, W4_GROUP, W4_MINUS_EIGHT != 0, (W4_TILES > 1)>;
constexpr bool kUp = W4_UP != 0;
constexpr int kConsumers = 256;
constexpr int kBlockTiles = 2 * S::kTiles;
constexpr int kWeightBytes = kBlockTiles * S::kTileBytes;
constexpr int kScaleBytes = kBlockTiles * S::kTileScaleBytes;
constexpr int kTokenBytes = S::kTokens * S::kK;
#if W4_ROW_SCALES
constexpr int kRowScalesAt = kWeightBytes + kScaleBytes + kTokenBytes;
constexpr int kStageBytes = kRowScalesAt + RowScales<S>::kBytes;
#else
constexpr int kStageBytes = kWeightBytes + kScaleBytes + kTokenBytes;
#endif
constexpr int kToken8Stride = S::kK * 8;
constexpr int kColumns = S::kAcc / 2;  // columns of which a thread holds results
constexpr int kCtasPerSm = S::kTokens <= 16 ? 2 : 1;

struct GemmParams {
  const u8* w;             // (E, rows, K / 2) in stage order, see hopper/layout.py
  const u8* scales;        // (E, rows, K / group) bfloat16 in stage order
  const u8* b;             // E4M3 rows: up (M, K), down (M * top_k, K)
  const void* ids;         // up: (M, top_k) int32 or int64
  const int* header;       // [0] number of tiles
  const int* tile_expert;  // (tiles)
  const int* columns;      // (tiles, W4_TOKENS) pair numbers, or -1
  const float* b_scale;    // static: (1); dynamic: up (M), down (M * top_k)
  const float* q_scale;    // up, static: (1) scale of the output
  u8* q;                   // up: (M * top_k, inner) E4M3
  float* q_row_scale;      // up, dynamic: (M * top_k)
  float* inner;            // up, dynamic: (M * top_k, inner) before quantisation
  u16* y;                  // down: (M * top_k, rows) bfloat16
  Join join;               // up: units cut by a run's end
  u32* tile_count;         // up, dynamic: (tiles), zero between launches
  int rows, k, blocks, top_k, ring, dynamic, pairs, experts, ids_are_64;
#if W4_ROW_SCALES
  // Row r of b is row r % slots of expert r / slots; strides in numbers.
  const float* row_scale;
  int slots, scale_expert, scale_slot, scale_span;
#endif
};

struct Work {
  const int* tile_expert;  // or null: `early`
  const u16* early;
  int first, last;         // stages of this CTA
  int ctas;                // with work
  long long total;         // stages
};

__device__ void produce(const GemmParams& p, const Work& work, u32 ring, u32 bars) {
  const int lane = threadIdx.x & 31, per_unit = p.join.stages_per_unit;
  const u64 policy = evict_first_policy();
  const u64 w_expert = static_cast<u64>(p.rows) * (p.k / 2);
  const u64 s_expert = static_cast<u64>(p.rows) * (p.k / S::kGroup) * 2;
  auto copy_weights = [&](int n, int slot) {  // one lane
    const int unit = n / per_unit, step = n - unit * per_unit;
    const int tile = unit / p.blocks, block = unit - tile * p.blocks;
    const u64 expert = work.tile_expert ? work.tile_expert[tile] : work.early[tile];
    const int row_tiles = min(kBlockTiles, p.rows / 64 - block * kBlockTiles);
    const u32 full = bars + slot * 16, stage = ring + slot * kStageBytes;
    const u32 wb = row_tiles * S::kTileBytes, sb = row_tiles * S::kTileScaleBytes;
    const u64 before =
        static_cast<u64>(block) * kBlockTiles * per_unit + static_cast<u64>(step) * row_tiles;
    barrier_expect(full, wb + sb);
    bulk_copy(stage, p.w + expert * w_expert + before * S::kTileBytes, wb, full, policy);
    bulk_copy(stage + kWeightBytes, p.scales + expert * s_expert + before * S::kTileScaleBytes, sb,
              full, policy);
  };
  // Weights do not depend on the kernel in front, tokens do.
  const int early = min(p.ring, work.last - work.first);
  if (lane == 0) {
    for (int i = 0; i < early; ++i) copy_weights(work.first + i, i);
  }
  __syncwarp();
  pdl_wait();

#if W4_ROW_SCALES
  int scale_row[RowScales<S>::kRows];
#endif
  const u8* row[S::kTokens / 8];
  bool used[S::kTokens / 8];
  int tile = -1, slot = 0;
  u32 phase = 0, filling = 0;
  for (int n = work.first; n < work.last; ++n) {
    const int unit = n / per_unit, step = n - unit * per_unit;
    if (unit / p.blocks != tile) {
      tile = unit / p.blocks;
#pragma unroll
      for (int j = 0; j < S::kTokens / 8; ++j) {
        const int pair = p.columns[tile * S::kTokens + j * 8 + (lane & 7)];
        used[j] = pair >= 0;
        row[j] = p.b + static_cast<u64>(kUp ? max(pair, 0) / p.top_k : max(pair, 0)) * p.k +
                 (lane >> 3) * 16;
      }
#if W4_ROW_SCALES
      RowScales<S>::find(p, tile, scale_row);
#endif
    }
    const u32 full = bars + slot * 16;
    if (n - work.first >= early) {
      barrier_wait(full + 8, phase ^ 1);
      if (lane == 0) copy_weights(n, slot);
      __syncwarp();
    }
    // 8 tokens x 4 pieces of 16 bytes per instruction: conflict-free writes, 64-byte reads.
    const u32 dst = ring + slot * kStageBytes + kWeightBytes + kScaleBytes + (lane >> 3) * 128 +
                    (lane & 7) * 16;
#pragma unroll
    for (int j = 0; j < S::kTokens / 8; ++j) {
      if (used[j]) {
#pragma unroll
        for (int i = 0; i < S::kK / 64; ++i) {
          async_copy16(dst + j * kToken8Stride + i * 512, row[j] + step * S::kK + i * 64);
        }
      }
    }
#if W4_ROW_SCALES
    RowScales<S>::copy(p, scale_row, step, ring + slot * kStageBytes + kRowScalesAt);
#endif
    async_copy_commit();
    // The stage before is handed over now that its tokens are there. Its writer, not its readers,
    // makes them visible to the matrix unit: they would do it with their stores in flight.
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
  if (kEveryLane || lane == 0) barrier_arrive(filling);
}

// `pair`: the pair numbers of this thread's columns, -1 for none. `b_scale`, `q_scale`: static.
__device__ __forceinline__ void finish_up(const GemmParams& p, float (&acc)[S::kAcc],
                                          const int (&pair)[kColumns], int tile, int row_tile,
                                          float b_scale, float q_scale, u32* flag) {
  const int thread = threadIdx.x & 127, group = threadIdx.x >> 7;
  const int width = p.rows / 2;
  const int f = row_tile * 32 + (thread >> 5) * 8 + ((thread & 31) >> 2);
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    if (pair[c] < 0) continue;
    const int i = (c >> 1) * 4 + (c & 1);
#if W4_ROW_SCALES
    const float scale = 512.0f;
#else
    const float scale = p.dynamic ? p.b_scale[pair[c] / p.top_k] * 512.0f : b_scale;
#endif
    const float v = silu_mul(acc[i] * scale, acc[i + 2] * scale);
    const u64 at = static_cast<u64>(pair[c]) * width + f;
    if (p.dynamic) {
      p.inner[at] = v;
    } else {
      p.q[at] = static_cast<u8>(pack_e4m3(__fdiv_rn(v, q_scale), 0.0f));
    }
  }
  if (p.dynamic && last_to_arrive(p.tile_count + tile, p.rows / 64, group, flag)) {
    for (int c = thread >> 5; c < S::kTokens; c += 4) {
      const int row = p.columns[tile * S::kTokens + c];
      if (row < 0) continue;
      u8* q = p.q + static_cast<u64>(row) * width;
      const float row_scale = quantize_row(p.inner + static_cast<u64>(row) * width, width,
                                           [&](int i, u32 four) {
                                             *reinterpret_cast<u32*>(q + i) = four;
                                           });
      if ((thread & 31) == 0) p.q_row_scale[row] = row_scale;
    }
  }
}

__device__ __forceinline__ void finish_down(const GemmParams& p, float (&acc)[S::kAcc],
                                            const int (&pair)[kColumns],
                                            const float (&scale)[kColumns],
                                            u32 (&done)[kColumns][S::kTiles], int row_tile,
                                            int tile) {
  const int thread = threadIdx.x & 127;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const int i = (c >> 1) * 4 + (c & 1);
    done[c][tile] = pack_bf16(acc[i] * scale[c], acc[i + 2] * scale[c]);
  }
  if (tile < S::kTiles - 1) return;
  // The row tiles of a stage interleave so that a thread's results are neighbours in a row of y.
  const int row =
      row_tile * 64 + ((thread >> 5) * 16 + ((thread & 31) >> 2) * 2) * S::kTiles;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    if (pair[c] < 0) continue;
    u16* at = p.y + static_cast<u64>(pair[c]) * p.rows + row;
    if constexpr (S::kTiles == 4) {
      *reinterpret_cast<uint4*>(at) = make_uint4(done[c][0], done[c][1], done[c][2], done[c][3]);
    } else if constexpr (S::kTiles == 2) {
      *reinterpret_cast<uint2*>(at) = make_uint2(done[c][0], done[c][1]);
    } else {
      *reinterpret_cast<u32*>(at) = done[c][0];
    }
  }
}

__device__ __forceinline__ void consume(const GemmParams& p, const Work& work, u32 ring, u32 bars,
                                        u32* flag) {
  const int thread = threadIdx.x & 127, group = threadIdx.x >> 7, lane = threadIdx.x & 31;
  const int per_unit = p.join.stages_per_unit;
  const u32 w_at = group * S::kTiles * S::kTileBytes + thread * 16;
  const u32 s_at = kWeightBytes + group * S::kTiles * S::kTileScaleBytes +
                   ((thread >> 5) * 8 + (lane >> 2)) * 4;
#if W4_ROW_SCALES
  const float b_scale = 0.0f;
#else
  const float b_scale = p.dynamic ? 0.0f : *p.b_scale * 512.0f;
#endif
  const float q_scale = p.dynamic || !kUp ? 1.0f : *p.q_scale;
  pdl_wait();
  if (kUp) pdl_trigger();
  float acc[S::kAcc], scale[kColumns];
  int pair[kColumns];
  int slot = 0, old_tile = -1;
  u32 phase = 0;
  for (int n = work.first; n < work.last;) {
    const int unit = n / per_unit, step = n - unit * per_unit;
    const int steps = min(per_unit - step, work.last - n);
    const int tile = unit / p.blocks;
    const int row_tile = ((unit - tile * p.blocks) * 2 + group) * S::kTiles;
    if (tile != old_tile) {
      // Loaded here, needed after the stages: the latency is hidden.
      old_tile = tile;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        pair[c] = p.columns[tile * S::kTokens + (c >> 1) * 8 + (lane & 3) * 2 + (c & 1)];
      }
      if (!kUp) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          scale[c] = p.dynamic ? p.b_scale[max(pair[c], 0)] * 512.0f : b_scale;
        }
      }
    }
    u32 done[kColumns][S::kTiles];
    auto finish = [&](int t, float(&sum)[S::kAcc]) {
      if constexpr (!kUp) {
        if (row_tile < p.rows / 64) finish_down(p, sum, pair, scale, done, row_tile, t);
      }
    };
#pragma unroll
    for (int i = 0; i < S::kAcc; ++i) acc[i] = 0.0f;
#pragma unroll 1
    for (int i = 0; i < steps; ++i) {
      const u32 full = bars + slot * 16, stage = ring + slot * kStageBytes;
      barrier_wait(full, phase);
      stage_math<S>(acc, stage + w_at, stage + s_at,
                    token_descriptor(stage + kWeightBytes + kScaleBytes, kToken8Stride), 0, finish
#if W4_ROW_SCALES
                    , stage + kRowScalesAt + (lane & 3) * 8
#endif
      );
      __syncwarp();
      if (kEveryLane || lane == 0) barrier_arrive(full + 8);
      if (++slot == p.ring) slot = 0, phase ^= 1;
    }
    n += steps;
    if constexpr (kUp) {
      if (steps == per_unit ||
          join_parts(p.join, acc, work.total, work.ctas, unit, step == 0)) {
        if (row_tile < p.rows / 64) {
          finish_up(p, acc, pair, tile, row_tile, b_scale, q_scale, flag);
        }
      }
    } else if constexpr (S::kTiles == 1) {
      finish(0, acc);
    }
  }
}

extern "C" __global__ void __launch_bounds__(kConsumers + 32, kCtasPerSm)
    w4a8_gemm(const __grid_constant__ GemmParams p) {
  extern __shared__ __align__(128) u8 shared[];
  __shared__ u32 flags[2];
  const u32 ring = smem_address(shared), bars = ring + p.ring * kStageBytes;
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.ring; ++i) {
      barrier_init(bars + i * 16, 1 + kLanes);  // weights and scales; tokens
      barrier_init(bars + i * 16 + 8, kConsumers / 32 * kLanes);
    }
    barrier_init_fence();
  }
  __syncthreads();
  Work work{p.tile_expert, nullptr, 0, 0, 0, 0};
  int tiles;
  if constexpr (kUp) {
    __shared__ TileList list;
    if (p.pairs <= kMaxEarlyPairs) {
      list_tiles<S::kTokens>(p.ids, p.ids_are_64, p.pairs, p.experts, list);
      work.tile_expert = nullptr;
      work.early = list.expert;
      tiles = list.total;
    } else {
      pdl_wait();
      tiles = p.header[0];
    }
    // The next kernel reads the tile list before its own wait, so it may start only when the
    // kernel that writes the list is known to be done: consumers trigger it.
  } else {
    pdl_trigger();
    tiles = p.header[0];
  }
  const int units = tiles * p.blocks, per_unit = p.join.stages_per_unit, cta = blockIdx.x;
  work.total = static_cast<long long>(units) * per_unit;
  const long long parts = kUp ? work.total : units;
  work.ctas = parts < gridDim.x ? static_cast<int>(parts) : gridDim.x;
  if (cta >= work.ctas) {
    pdl_wait();
    return;
  }
  const int size = kUp ? 1 : per_unit;
  work.first = static_cast<int>(run_start(parts, cta, work.ctas)) * size;
  work.last = static_cast<int>(run_start(parts, cta + 1, work.ctas)) * size;
  if (threadIdx.x >= kConsumers) {
    produce(p, work, ring, bars);
  } else {
    consume(p, work, ring, bars, flags + (threadIdx.x >> 7));
  }
}
