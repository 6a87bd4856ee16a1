// Down of the prefill path: w2 times the FP8 products, and the sum over each token's experts.
//
// What the pairs contribute goes through `y`, a ring of three slices (a few blocks of 256 outputs, for
// one list of tokens each): while one slice is multiplied, the one before is added up in the order of
// top_k, so results do not depend on timing and no tensor of all contributions is needed. Items, in
// order: for each slice its matrix items, then the sums of the slice before.
//
// 256 bytes of y hold the 128 outputs of a pair that one warpgroup has, as its threads have them:
// [warp][g 8][row tile 2][row half 2], in 16-byte pieces of which piece i of the pair in row r is at
// i ^ (r % 8), so that threads write them to shared memory without bank conflicts. From there one
// bulk copy per item takes them away while the warpgroup goes on.
#include "prefill.cuh"

constexpr int kBuffers = 3;      // slices in y
constexpr int kWarpTokens = 16;  // of an item of sums and a warp, at most
constexpr int kAtOnce = 32;      // contributions that travel together
constexpr int kOutBytes = kTokens * 256;
static_assert(kPerWg == 2, "");

struct PrefillDownParams {
  Weights weights;
  const u8* b;             // (M * top_k, K) E4M3
  const Tile* tiles;       // (lists, max_tiles)
  const int* header;       // (lists) number of tiles
  const int* columns;      // (lists, list_pairs) pair numbers, sorted by expert
  const int* place;        // (M * top_k) a pair's place in its list, or -1
  const float* b_scale;    // static: (1); dynamic: (M * top_k)
  const float* topk_weights;  // (M, top_k)
  u8* y;                   // (kBuffers, slice_blocks, 2, list_pairs, 256 bytes)
  u16* out;                // (M, rows) bfloat16
  u32* claimed;            // zero before
  u32* done;               // (slices * lists, 2): matrix items, sums; zero before
  float factor;
  int tokens, top_k, lists, list_tokens, max_tiles, slices, slice_blocks, warp_tokens, ring;
};

// 16 bytes from L2, or zeros. Volatile, so that the loads of a batch leave before any is used.
__device__ __forceinline__ uint4 load_if(bool wanted, const u8* from) {
  uint4 v;
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\n"
      "mov.u32 %0, 0;\nmov.u32 %1, 0;\nmov.u32 %2, 0;\nmov.u32 %3, 0;\n"
      "@p ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];\n}\n"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
      : "l"(from), "r"(static_cast<u32>(wanted))
      : "memory");
  return v;
}

// Spins until `count` has reached `target`. A whole warp.
__device__ __forceinline__ void wait_count(const u32* count, u32 target) {
  u32 seen;
  do {
    asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(seen) : "l"(count) : "memory");
  } while (static_cast<u32>(uniform(seen)) < target);
}

__device__ __forceinline__ int blocks_of(const PrefillDownParams& p, int slice) {
  const int blocks = (p.weights.rows / 64 + kRowTiles - 1) / kRowTiles;
  return min(p.slice_blocks, blocks - slice * p.slice_blocks);
}
__device__ __forceinline__ int list_tokens(const PrefillDownParams& p, int list) {
  return min(p.list_tokens, p.tokens - list * p.list_tokens);
}
__device__ __forceinline__ int sum_tokens(const PrefillDownParams& p) {
  return p.warp_tokens * (kConsumers / 32);
}
// Sums of a slice of `blocks` blocks: some tokens by 256 outputs each.
__device__ __forceinline__ int sum_items(const PrefillDownParams& p, int list, int blocks) {
  const int tokens = sum_tokens(p);
  return (list_tokens(p, list) + tokens - 1) / tokens * blocks;
}

// What is claimed, in order. A step is a slice of one list: its matrix items, then the sums of the
// step before. Lists run inside slices, so that a slice's weights are read once and come from L2
// for the other lists. Numbers only grow, so the step is found by going on from the last one.
struct Order {
  const PrefillDownParams& p;
  int step = 0, begin = 0;

  __device__ __forceinline__ Item item(int number) {
    Item item{};
    for (;; ++step) {
      const int slice = step / p.lists, list = step - slice * p.lists;
      const int blocks = slice < p.slices ? blocks_of(p, slice) : 0;
      const int matrix = p.header[list] * blocks;
      const int old_list = list > 0 ? list - 1 : p.lists - 1;
      const int old_slice = list > 0 ? slice : slice - 1;
      const int old_blocks = step > 0 ? blocks_of(p, old_slice) : 0;
      const int sums = sum_items(p, old_list, old_blocks);
      const int at = number - begin;
      if (at < matrix) {
        const int i = at / blocks;
        const Tile tile = p.tiles[list * p.max_tiles + i];
        item.kind = kMatrix, item.expert = tile.expert, item.first = tile.first;
        item.count = tile.count, item.slice = slice, item.step = step, item.list = list;
        item.block = slice * p.slice_blocks + (at - i * blocks);
        return item;
      }
      if (at < matrix + sums) {
        const int i = (at - matrix) / old_blocks;
        item.kind = kCombine, item.first = i * sum_tokens(p), item.step = step - 1;
        item.list = old_list, item.slice = old_slice;
        item.block = old_slice * p.slice_blocks + (at - matrix - i * old_blocks);
        return item;
      }
      if (step == p.slices * p.lists) return item;
      begin += matrix + sums;
    }
  }
};

// What a consumer warp remembers between items; in shared memory, as registers are short.
struct Memory {
  int free_before;  // steps below this are known to have left their buffers
  int whole_before;  // steps below this are known to be in their buffers
  int kind, step, items;  // done by this warpgroup and not counted in yet
};

// A contribution that a warp adds up: its row in y with the token in the high byte, and its weight.
struct Summed {
  u32 row;
  float weight;
};

__shared__ Memory memories[kConsumers / 32];
constexpr int kWarpPairs = kWarpTokens * 8;  // top_k at most (hopper/plan_prefill.py)
__shared__ Summed summed[kConsumers / 32][kWarpPairs];
__shared__ Queue queue;

struct DownBody {
  const PrefillDownParams& p;
  const Ring& ring;
  u32 out_at;  // shared memory, kOutBytes for each warpgroup
  Reader reader;
  Place place;

  // Both are read again after the loop over K.
  __device__ __forceinline__ const Item& item() const { return queue.item[reader.number % kQueue]; }
  __device__ __forceinline__ static Memory& memory() { return memories[threadIdx.x >> 5]; }

  // Counts in what this warpgroup has done, before it goes on to something of another step or kind:
  // a fence for each item would cost more than the item. Never later than before it waits itself.
  __device__ __forceinline__ void count_in(int kind, int step) {
    const int items = uniform(memory().items);
    if (items == 0 || (uniform(memory().kind) == kind && uniform(memory().step) == step)) return;
    const int wg = threadIdx.x >> 7;
    named_sync(1 + wg, 128);
    if ((threadIdx.x & 127) == 0) {
      u32* count = p.done + memory().step * 2 + (memory().kind == kCombine);
      bulk_store_wait();
      asm volatile("fence.acq_rel.gpu;" ::: "memory");
      asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(count), "r"(items) : "memory");
    }
    set(memory().items, 0);
  }
  __device__ __forceinline__ void remember(int kind, int step) {
    const int items = memory().items;
    set(memory().items, items + 1);
    set(memory().kind, kind);
    set(memory().step, step);
  }
  // A whole warp writes what a whole warp reads.
  __device__ __forceinline__ static void set(int& field, int value) {
    __syncwarp();
    field = value;
    __syncwarp();
  }

  // y of the outputs of warpgroup `wg` in block `block` of a slice.
  __device__ __forceinline__ u8* buffer(int step, int block, int wg) const {
    return p.y + ((static_cast<u64>(step % kBuffers) * p.slice_blocks + block) * 2 + wg) *
                     (static_cast<u64>(p.list_tokens) * p.top_k * 256);
  }

  template <int kN>
  __device__ __forceinline__ void run() {
    float acc[2][kN / 2];
    multiply<kN>(acc, p.weights.k / kSpan, ring, place);
    const int step = uniform(item().step), old = step - kBuffers;
    count_in(kMatrix, step);
    const int thread = threadIdx.x & 127, wg = threadIdx.x >> 7, lane = threadIdx.x & 31;
    if (old >= 0 && uniform(memory().free_before) <= old) {
      wait_count(p.done + old * 2 + 1,
                 2 * sum_items(p, old % p.lists, blocks_of(p, old / p.lists)));
      set(memory().free_before, old + 1);
    }
    const float b_scale = W4_DYNAMIC != 0 ? 0.0f : *p.b_scale * 512.0f;
    if ((threadIdx.x & 127) == 0) bulk_store_wait_read();  // of the item before
    named_sync(1 + wg, 128);
    // Lanes g and g ^ 1 exchange one token each of two, so that both store 16 bytes.
    const int g = lane >> 2, odd = g & 1, count = item().count;
    const u32 to = out_at + wg * kOutBytes + ((lane & 3) * 2 + odd) * 256;
    const int row = item().first + (lane & 3) * 2 + odd;
    const u32 piece = (((thread >> 5) * 4 + (g >> 1)) ^ (row & 7)) * 16;
    auto scale_of = [&](int c) {
      if constexpr (W4_DYNAMIC != 0) {
        const int* list = p.columns + static_cast<u64>(item().list) * p.list_tokens * p.top_k;
        return c < count ? p.b_scale[list[item().first + c]] * 512.0f : 0.0f;
      } else {
        return b_scale;
      }
    };
#pragma unroll
    for (int i = 0; i < kN / 2; i += 4) {
      const int c = i * 2 + (lane & 3) * 2;
      u32 token[2][2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float scale = scale_of(c + e);
        token[e][0] = pack_bf16(acc[0][i + e] * scale, acc[0][i + e + 2] * scale);
        token[e][1] = pack_bf16(acc[1][i + e] * scale, acc[1][i + e + 2] * scale);
      }
      const u32 other0 = __shfl_xor_sync(0xffffffffu, odd ? token[0][0] : token[1][0], 4);
      const u32 other1 = __shfl_xor_sync(0xffffffffu, odd ? token[0][1] : token[1][1], 4);
      sts128(to + i * 2 * 256 + piece,
             odd ? make_uint4(other0, other1, token[1][0], token[1][1])
                 : make_uint4(token[0][0], token[0][1], other0, other1));
    }
    fence_async_proxy();
    named_sync(1 + wg, 128);
    if ((threadIdx.x & 127) == 0) {
      bulk_store(buffer(step, item().block - item().slice * p.slice_blocks, wg) +
                     static_cast<u64>(item().first) * 256,
                 out_at + wg * kOutBytes, count * 256);
    }
    remember(kMatrix, step);
  }

  // Adds up the experts of an item's tokens for 256 outputs. A warp first lists the contributions
  // of its tokens, in the order of token and top_k, as with expert parallelism most pairs are other
  // ranks'. Then many travel together, whichever token they are for.
  __device__ __forceinline__ void sum() {
    const int lane = threadIdx.x & 31, step = uniform(item().step);
    count_in(kCombine, step);
    const int list = item().list, slice = item().slice, block = item().block;
    if (uniform(memory().whole_before) <= step) {
      wait_count(p.done + step * 2, 2 * p.header[list] * blocks_of(p, slice));
      set(memory().whole_before, step + 1);
    }
    // Eight pairs a token at a time; more experts need several rounds for fewer tokens.
    const int at_once = max(1, p.warp_tokens / ((p.top_k + 7) / 8));
    // Uniform, as a loop that lanes might leave one by one costs the loop over K registers.
    const int begin = uniform(item().first + (threadIdx.x >> 5) * p.warp_tokens);
    const int end = uniform(min(begin + p.warp_tokens, list_tokens(p, list)));
    const u8* from = buffer(step, block - slice * p.slice_blocks, lane >> 4);
    for (int first = begin; first < end; first += at_once) {
      const int tokens = min(at_once, end - first);
      const int pairs = find_pairs(list, first, tokens);
      add_up(list * p.list_tokens + first, tokens, pairs, from, block * 256);
    }
    remember(kCombine, step);
  }

  // Lists the contributions of `tokens` tokens of a list; how many they are.
  __device__ __forceinline__ int find_pairs(int list, int first, int tokens) {
    const int lane = threadIdx.x & 31, all = tokens * p.top_k;
    const int pair = (list * p.list_tokens + first) * p.top_k;
    Summed* found = summed[threadIdx.x >> 5];
    int count = 0;
    __syncwarp();  // the ones before have been read
    for (int before = 0; before < all; before += 32) {
      const int i = before + lane;
      const int row = i < all ? p.place[pair + i] : -1;
      const u32 valid = __ballot_sync(0xffffffffu, row >= 0);
      if (row >= 0) {
        const int at = count + __popc(valid & ((1u << lane) - 1));
        found[at] = Summed{static_cast<u32>(row) | static_cast<u32>(i / p.top_k) << 24,
                           p.topk_weights[pair + i]};
      }
      count += __popc(valid);
    }
    __syncwarp();
    return count;
  }

  __device__ __forceinline__ void add_up(int token, int tokens, int pairs, const u8* from,
                                         int row) {
    const int lane = threadIdx.x & 31;
    const Summed* found = summed[threadIdx.x >> 5];
    float total[8] = {};
    int current = 0;  // token of the running sums
    auto finish = [&](int before) {
      for (; current < before; ++current) {
        store(token + current, row, total);
#pragma unroll
        for (int e = 0; e < 8; ++e) total[e] = 0.0f;
      }
    };
    for (int begin = 0; begin < pairs; begin += kAtOnce) {
      uint4 v[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int at = uniform(static_cast<int>(found[min(begin + i, pairs - 1)].row)) & 0xffffff;
        const u32 piece = ((lane & 15) ^ (at & 7)) * 16;
        v[i] = load_if(begin + i < pairs, from + static_cast<u64>(at) * 256 + piece);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (begin + i >= pairs) break;
        const Summed one = found[begin + i];
        finish(uniform(static_cast<int>(one.row >> 24)));
        const u32 w[4] = {v[i].x, v[i].y, v[i].z, v[i].w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          total[2 * e] += one.weight * bf16_low(w[e]);
          total[2 * e + 1] += one.weight * bf16_high(w[e]);
        }
      }
    }
    finish(tokens);
  }

  // The four pairs of outputs of a lane, at their rows (hopper/layout.py, _row_order).
  __device__ __forceinline__ void store(int token, int row, const float (&total)[8]) {
    u32 r[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      r[j] = pack_bf16(p.factor * total[2 * j], p.factor * total[2 * j + 1]);
    }
    const int lane = threadIdx.x & 31;
    const int wg = lane >> 4, warp = (lane >> 2) & 3, g = (lane & 3) * 2;
    u16* out = p.out + static_cast<u64>(token) * p.weights.rows;
    auto two = [&](int at, u32 low, u32 high) {
      if (at < p.weights.rows) *reinterpret_cast<uint2*>(out + at) = make_uint2(low, high);
    };
    if constexpr (kLayoutTiles == 1) {
      const int at = row + wg * 128 + warp * 16 + g * 2;
      two(at, r[0], r[2]);
      two(at + 64, r[1], r[3]);
    } else if constexpr (kLayoutTiles == 2) {
      const int at = row + wg * 128 + warp * 32 + g * 4;
      two(at, r[0], r[1]);
      two(at + 4, r[2], r[3]);
    } else {
      const int at = row + warp * 64 + g * 8 + wg * 4;
      two(at, r[0], r[1]);
      two(at + 8, r[2], r[3]);
    }
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    w4a8_prefill_down(const __grid_constant__ PrefillDownParams p) {
  extern __shared__ __align__(128) u8 shared[];
  const Ring ring = make_ring(shared, p.ring, 2 * kOutBytes);
  pdl_wait();
  pdl_trigger();
  if (threadIdx.x >= kConsumers) {
    give_registers();
    const int warp = (threadIdx.x - kConsumers) >> 5;
    if (warp == 0) {
      produce_weights(p.weights, queue, ring);
    } else if (warp == 1) {
      if ((threadIdx.x & 31) != 0) return;
      Order order{p};
      claim(queue, ring, p.claimed, [&](u32 number) { return order.item(number); });
    } else {
      produce_tokens(p.b, p.weights.k, p.columns, p.list_tokens * p.top_k, queue, ring, warp - 2,
                     [](int pair) { return static_cast<u32>(pair); });
    }
    return;
  }
  take_registers();
  memories[threadIdx.x >> 5] = Memory{};
  __syncwarp();
  DownBody body{p, ring, ring.end, Reader{}, Place{}};
  for (;;) {
    const Item& item = body.reader.wait(queue, ring);
    const int kind = uniform(item.kind);
    if (kind == kEnd) break;
    if (kind == kCombine) {
      body.sum();
    } else {
      with_columns(item.count, body);
    }
    body.reader.release(ring);
  }
  body.count_in(kEnd, 0);
}
