// Gate and up of the prefill path: w13 times the tokens of each expert, SiLU(gate)*up, FP8.
//
// See prefill.cuh, and prefill_listed.cuh for tokens in the order of the list. W4_PANEL: see
// q_piece. With per-token scales the products go to `inner` in FP32 and whoever completes a tile
// quantises its rows before its next item (W4_DYNAMIC=1, prefill_inner.cuh). Tokens that came in
// E4M3 with a scale for each 128 columns keep these (W4_ROW_SCALES=1).
#include "prefill.cuh"
#include "prefill_inner.cuh"
#include "prefill_listed.cuh"

constexpr bool kDynamic = W4_DYNAMIC != 0;
constexpr bool kHalved = kCluster == 1;  // whether the last items may be halves
constexpr u32 kOutPanel = W4_PANEL;         // columns of a panel of q; 0: rows are whole
constexpr int kFeatures = kPerWg * 32;      // of a warpgroup
constexpr int kPitch = kFeatures + 16;      // bytes of a token's row while results are gathered
constexpr int kGatherBytes = kDynamic ? 16 : kTokens * kPitch;

struct PrefillUpParams {
  Weights weights;
  const u8* b;           // (M, K) E4M3, or as Listed has it; with W4_ROW_SCALES the latter only
  const Tile* tiles;     // (lists, max_tiles)
  const int* header;     // (lists) number of tiles
  const int* columns;    // (lists, list_pairs) pair numbers, sorted by expert
  const float* b_scale;  // static: (1); dynamic: (M); not looked at if tokens have span scales
  const float* q_scale;  // static: (1) scale of the output
  u8* q;                 // (M * top_k, inner) E4M3, or as q_piece says
  const int* rows;       // where a pair's row of q is: columns, or see q_row in prefill_sort.cuh
  float* q_row_scale;    // dynamic: (M * top_k)
  float* inner;          // dynamic: (M * top_k, inner) before quantisation
  u32* claimed;          // zero before
  u32* tile_count;       // dynamic: (lists, max_tiles) columns of blocks, zero before
  u32* arrived;          // route's counter, done with
  int top_k, lists, list_pairs, max_tiles, ring;
  int q_rows;
  const int* total;      // sorted: pairs
  const u8* empty;       // sorted: (M) whether a token has none
  u16* out;              // sorted: (M, K) bfloat16, of which tokens without a pair are zeroed here
  int room, tokens;      // sorted: rows of b if all pairs have room; M
  Listed listed;         // sorted
};

// Where column `column` (a multiple of 4) of a row of q goes. For prefill_own_down.cu q is (panels,
// q_rows, panel), and 16-byte pieces of a row are where the matrix unit wants them: swizzled by its
// number.
__device__ __forceinline__ u8* q_piece(const PrefillUpParams& p, int row, u32 column) {
  if constexpr (kOutPanel == 0) {
    return p.q + static_cast<u64>(row) * (p.weights.rows / 2) + column;
  } else {
    const u32 number = static_cast<u32>(row) >> 28, key = kOutPanel == 128 ? number : number >> 1;
    constexpr u32 kColumns = kOutPanel > 0 ? kOutPanel : 1;
    const u64 at = static_cast<u64>(column / kColumns) * p.q_rows + (row & 0xfffffff);
    return p.q + at * kColumns + ((column % kColumns) ^ (key * 16));
  }
}

// What is claimed, in order: the blocks of a tile one after the other, so that CTAs beside each
// other read the same tokens, and the tiles of an expert, so that they read the same weights. The
// CTAs of a cluster have the same number: each takes the same block of another tile of the same
// expert.
struct Order {
  const PrefillUpParams& p;
  // Items from `cut` on are halves of what they would be: the last round of all CTAs, if it has so
  // few items that there are CTAs for twice as many.
  int cut = 0;
  int list = 0, begin = 0;

  __device__ __forceinline__ static Order of(const PrefillUpParams& p) {
    Order order{p};
    int all = 0;
    for (int i = 0; i < p.lists; ++i) all += order.items(i);
    const int ctas = gridDim.x, rest = all % ctas;
    order.cut = kHalved && rest * 2 <= ctas ? all - rest : all;
    return order;
  }
  __device__ __forceinline__ int blocks() const {
    return (p.weights.rows / 64 + kRowTiles - 1) / kRowTiles;
  }
  __device__ __forceinline__ int items(int list) const {
    return p.header[list] / kCluster * blocks();
  }

  __device__ __forceinline__ Item item(int number) {
    const int past = number - cut, skipped = max(past + 1, 0) / 2;
    number -= skipped;
    Item item{};
    for (; list < p.lists; ++list) {
      const int here = items(list), at = number - begin;
      if (at < here) {
        const int i = at / blocks() * kCluster + blockIdx.x % kCluster;
        const Tile tile = p.tiles[list * p.max_tiles + i];
        item.kind = kMatrix, item.expert = tile.expert, item.first = tile.first;
        item.count = tile.count, item.tile = list * p.max_tiles + i;
        item.block = at % blocks(), item.list = list;
        if (past >= 0) {
          const int most = min((tile.count + 31) / 32 * 16, tile.count);
          const int before = past % 2 == 0 ? 0 : most;
          item.first = tile.first + before;
          item.count = past % 2 == 0 ? most : tile.count - most;
        }
        return item;
      }
      begin += here;
    }
    return item;
  }
};

__shared__ Queue queue;
// What sums are multiplied by, and products divided by: there are no registers for them while K is
// gone through.
__shared__ float b_factor, q_divisor;

// Rows of x in the order of the list, blocks of kBlockRows: a copy for each piece of a panel. The
// warp that fills the ring reads items for those that write rows, too.
struct BlockRows {
  static constexpr int kPanels = kStageK / kPanel;
  static constexpr int kPieces = (kTokens + kBlockRows - 2) / kBlockRows + 1;  // blocks of an item
  static constexpr int kRowCopies = kPanels * kPieces, kReads = 3;
  static constexpr int kCopies = kRowCopies + (kRowScales ? 1 : 0);
  const u8* x;
  int k;
  Written written;
  __device__ __forceinline__ void wait(const Item& item) { written.wait(item.first + item.count); }
  __device__ __forceinline__ static u32 scale_bytes(const Item& item) {
    return kRowScales ? (item.count + 3) / 4 * 16 : 0;
  }
  __device__ __forceinline__ u32 bytes(const Item& item) const {
    return item.count * kStageK + scale_bytes(item);
  }
  __device__ __forceinline__ Copy copy(const Item& item, int number) const {
    return number < kRowCopies ? codes(item, number) : scales(item);
  }
  __device__ __forceinline__ Copy codes(const Item& item, int number) const {
    const int panel = number / kPieces, block = item.first / kBlockRows + number % kPieces;
    const int begin = max(item.first, block * kBlockRows);
    const int end = min(item.first + item.count, (block + 1) * kBlockRows);
    const u64 line = static_cast<u64>(block * (k / kPanel) + panel - block) * kBlockRows;
    const u32 bytes = max(end - begin, 0) * kPanel;
    const u32 to = (panel * kTokens + begin - item.first) * kPanel;
    return Copy{x + (line + begin) * kPanel, to, bytes};
  }
  __device__ __forceinline__ Copy scales(const Item& item) const {
    const SpanScales& spans = written.p.spans;
    const int row = span_row(item.first, 0, item.expert);  // it begins where eight columns do
    return Copy{reinterpret_cast<const u8*>(spans.listed + row), kColumnScalesAt,
                scale_bytes(item)};
  }
  __device__ __forceinline__ u32 next(int number) const {
    return number < kRowCopies ? kBlockRows * kStageK : written.p.spans.rows * 4;
  }
};

// Scales of tokens that lanes gather, three columns of a stage each.
struct GatheredScales {
  static constexpr int kMine = kTokens / 64;
  const SpanScales& spans;
  int top_k, first;  // this lane's first column
  int at[kMine] = {};  // -1: none
  __device__ __forceinline__ void find(const int* pairs, int count) {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int c = first + i * 32;
      at[i] = c < count ? pairs[c] / top_k * spans.of_token : -1;
    }
  }
  __device__ __forceinline__ void copy(u32 to, int step) const {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      if (at[i] < 0) continue;
      async_copy4(to + (first + i * 32) * 4, spans.from + at[i] + step * spans.of_span);
    }
  }
};

// One warp: zeros for those of `count` tokens from `token` on, of each `step`, that have no pair.
// Returns the next token.
__device__ __forceinline__ int zero_tokens(const PrefillUpParams& p, int token, int step,
                                           int count) {
  for (int i = 0; i < count && token < p.tokens; ++i, token += step) {
    if (p.empty[token] == 0) continue;
    u16* row = p.out + static_cast<u64>(token) * p.weights.k;
    for (int k = (threadIdx.x & 31) * 8; k < p.weights.k; k += 256) {
      *reinterpret_cast<uint4*>(row + k) = make_uint4(0, 0, 0, 0);
    }
  }
  return token;
}
// Warp `part` of two: rows of x, and some zeros with each unit of them.
__device__ __forceinline__ void write_beside(const PrefillUpParams& p, int part) {
  const int step = 2 * gridDim.x;
  int token = blockIdx.x * 2 + part;
  write_listed<kRowScales>(p.listed, *p.total, [&] { token = zero_tokens(p, token, step, 8); });
  zero_tokens(p, token, step, p.tokens);
}

template <bool kShort>
struct WayOf {
  using type = ItemPlace;
};
template <>
struct WayOf<true> {
  using type = CountingPlace;
};
using Way = WayOf<kSorted>::type;

// Without a branch: between those the compiler has fewer registers for sums.
__device__ __forceinline__ void store_if(bool wanted, float* to, float value) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %0, 0;\n@p st.global.f32 [%1], %2;\n}" ::"r"(
                   static_cast<u32>(wanted)),
               "l"(to), "f"(value)
               : "memory");
}

struct UpBody {
  const PrefillUpParams& p;
  const Ring& ring;
  u8* gather;      // of this warpgroup
  Way place;

  // Read again after the loop over K.
  __device__ __forceinline__ const Item& item() const {
    return queue.item[place.number() % kQueue];
  }

  // Where column c of the item is in q.
  __device__ __forceinline__ int row_of(u64 first_column, int c) const {
    const int row = static_cast<int>(first_column) + c;
    return kSorted ? row | (c & 7) << 28 : p.rows[first_column + c];
  }

  template <int kN>
  __device__ __forceinline__ void run() {
    float acc[kPerWg][kN / 2];
    multiply<kN>(acc, p.weights.k / kStageK, ring, place, !kSorted || *p.total > p.room);
    const int number = kDynamic ? read_thread() : threadIdx.x;
    const int thread = number & 127, wg = number >> 7, lane = number & 31;
    const int width = p.weights.rows / 2;
    const u64 first_column = static_cast<u64>(item().list) * p.list_pairs + item().first;
    const int row_tile = (item().block * kWgs + wg) * kPerWg;
    const int tiles = min(kPerWg, p.weights.rows / 64 - row_tile);
    const int f = (thread >> 5) * 8 + (lane >> 2);
    const float b_scale = __uint_as_float(lds32(smem_address(&b_factor)));
    const float q_scale = __uint_as_float(lds32(smem_address(&q_divisor)));
    const float q_inverse = __frcp_rn(q_scale);
    const Column* columns = kDynamic ? wait_columns(place.number()) : nullptr;
#pragma unroll
    for (int i = 0; i < kN / 2; i += 4) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int c = i * 2 + (lane & 3) * 2 + e;
        if constexpr (kDynamic) {
          const Column column = columns[c];
          float* to = p.inner + static_cast<long long>(column.pair) * width + row_tile * 32 + f;
#pragma unroll
          for (int t = 0; t < kPerWg; ++t) {
            store_if(column.pair >= 0 && t < tiles, to + t * 32,
                     silu_mul_fast(acc[t][i + e] * column.scale, acc[t][i + e + 2] * column.scale));
          }
        } else {
#pragma unroll
          for (int t = 0; t < kPerWg; ++t) {
            const float v =
                silu_mul_fast(acc[t][i + e] * b_scale, acc[t][i + e + 2] * b_scale);
            gather[c * kPitch + t * 32 + f] =
                static_cast<u8>(pack_e4m3(divide(v, q_scale, q_inverse), 0.0f));
          }
        }
      }
    }
    if constexpr (kDynamic) return;
    // Rows of features together: a pair's row of q is written in pieces of 16 bytes.
    named_sync(1 + wg, 128);
    constexpr int kPieces = kFeatures / 16;
    const int piece = thread % kPieces;
    for (int c = thread / kPieces; c < item().count; c += 128 / kPieces) {
      if (piece * 16 < tiles * 32) {
        *reinterpret_cast<uint4*>(q_piece(p, row_of(first_column, c), row_tile * 32 + piece * 16)) =
            *reinterpret_cast<const uint4*>(gather + c * kPitch + piece * 16);
      }
    }
    named_sync(1 + wg, 128);
  }

  // With per-token scales, all warpgroups: rows of the tile that is complete, if there is one.
  __device__ __forceinline__ void quantize_complete() {
    const Complete tile = complete[place.number() % kQueue];
    if (uniform(tile.count) == 0) return;
    quantize_tile<kRowsHeld>(
        p, p.columns + tile.first_column, tile.count,
        [&](int c) { return row_of(tile.first_column, c); },
        [&](int row, int i, u32 four) { *reinterpret_cast<u32*>(q_piece(p, row, i)) = four; });
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, 1)
#if W4_CLUSTER > 1
__cluster_dims__(W4_CLUSTER, 1, 1)
#endif
    w4a8_prefill_up(const __grid_constant__ PrefillUpParams p) {
  extern __shared__ __align__(128) u8 shared[];
  __shared__ __align__(16) u8 gather[kWgs][kGatherBytes];
  if (kDynamic && threadIdx.x == 0) make_columns();
  const Ring ring = make_ring(shared, p.ring, 0);
  pdl_wait();
  pdl_trigger();
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.arrived = 0;
  if (threadIdx.x == 0) {
    b_factor = kDynamic ? 0.0f : (kRowScales ? 1.0f : *p.b_scale) * 512.0f;
    q_divisor = kDynamic ? 1.0f : *p.q_scale;
  }
  __syncthreads();
  if (threadIdx.x >= kConsumers) {
    give_registers();
    const int warp = (threadIdx.x - kConsumers) >> 5;
    const int total = kSorted ? *p.total : 0;
    const bool listed = kSorted && total <= p.room;
    if (warp == 1) {
      if (!kDynamic && (threadIdx.x & 31) != 0) return;
      Order order = Order::of(p);
      auto describe = [&](u32 number) { return order.item(number); };
      if constexpr (kDynamic) {
        Written written = Written::of(p.listed, total);  // and their scales with them
        claim_and_count(p, queue, ring, order.blocks(), describe, [&](const Item& item) {
          if (listed && !kRowScales) written.wait(item.first + item.count);
        });
      } else {
        claim(queue, ring, p.claimed, describe);
      }
    } else if (listed) {
      if constexpr (kSorted) {
        if (warp == 0) {
          const Written written = Written::of(p.listed, total);
          produce_stages(p.weights, queue, ring, BlockRows{p.b, p.weights.k, written});
        } else {
          write_beside(p, warp - 2);
        }
      }
    } else if (warp == 0) {
      if constexpr (kSorted) {
        produce_stages(p.weights, queue, ring, NoRows{});
      } else {
        produce_weights(p.weights, queue, ring);
      }
    } else {
      auto row = [&](int pair) { return static_cast<u32>(pair / p.top_k); };
      auto produce = [&](const u8* b, auto scales) {
        produce_tokens(b, p.weights.k, p.columns, p.list_pairs, queue, ring, warp - 2, row, scales);
      };
      if constexpr (kRowScales) {
        const int first = (warp - 2) * (kTokens / 2) + (threadIdx.x & 31);
        produce(reinterpret_cast<const u8*>(p.listed.x),
                GatheredScales{p.listed.spans, p.top_k, first});
      } else {
        produce(p.b, NoScales{});
      }
      if (kSorted && warp == 3) zero_tokens(p, blockIdx.x, gridDim.x, p.tokens);
    }
    return;
  }
  take_registers();
  UpBody body{p, ring, gather[threadIdx.x >> 7], Way{}};
  for (;;) {
    Reader reader{body.place.number()};
    const Item& item = reader.wait(queue, ring);
    if constexpr (kDynamic) body.quantize_complete();
    const int kind = uniform(item.kind);
    if (kind == kEnd) break;
    const bool idle = kSorted && (item.block * kWgs + (threadIdx.x >> 7)) * 64 >= p.weights.rows;
    if (uniform(item.count == 0 || idle)) {
      const int stages = kDynamic && kind == kRest ? 0 : p.weights.k / kStageK;
      pass(stages, ring, body.place, kSorted && *p.total > p.room);
    } else {
      with_columns(item.count, body);
    }
    Reader{body.place.number()}.release(ring);
    body.place.next_item();
  }
  if constexpr (kCluster > 1) cluster_sync();  // the other CTA may still arrive here
}
