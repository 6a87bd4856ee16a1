// Down of the prefill path: w2 times the FP8 products, and the sum over each token's experts.
//
// Rows of the list are (token, k) pairs sorted by expert. The result of a token's only row goes to
// its place at once. Those of tokens with several rows go through `y` and are added up where the
// last of them is, by whichever warp claims that tile, in the order of k: results do not depend on
// timing. With expert parallelism most tokens have one row or two, so little goes through memory.
//
// Beside the consumers there are four warps: one fills the ring, one, the clerk, claims items and
// tells other CTAs what is done, and two claim tiles whose sums are due and add up, while consumers
// are at other items. They use few registers: what is added comes to shared memory, where each lane
// reads what it has asked for itself. Consumers that find no more items add up, too.
//
// Items and sums are claimed in order, and wait for tiles with smaller numbers only, so that CTAs
// need not all be resident. Outputs are cut into slices of `per_slice` blocks of 128, tiles run
// inside slices, and y holds two slices: what a slice writes takes the place of what the last but
// one did.
//
// W4_PANEL of prefill_up.cu is this kernel's kPanel. W4_DYNAMIC: q has a scale for each pair.
#include "prefill_tables.cuh"

// Eight outputs of a token, at their rows (hopper/layout.py, _row_order).
__device__ __forceinline__ void store(const PrefillDownParams& p, int token, int tile, int piece,
                                      uint4 v) {
  u16* out = p.out + static_cast<u64>(static_cast<u32>(token)) * static_cast<u32>(p.weights.rows);
  if constexpr (kLayoutTiles == 1) {
    *reinterpret_cast<uint4*>(out + tile * 64 + piece * 8) = v;
  } else {
    const int row = tile / kLayoutTiles * kLayoutTiles * 64 + tile % kLayoutTiles * 2;
    const u32 r[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      *reinterpret_cast<u32*>(out + row + (piece * 4 + j) * 2 * kLayoutTiles) = r[j];
    }
  }
}

struct DownBody {
  const PrefillDownParams& p;
  const Ring& ring;
  const Tables& tables;
  CountingPlace place;

  // Read again after the loop over K.
  __device__ __forceinline__ const Item& item() const {
    return queue.item[place.number() % kQueue];
  }

  template <int kN>
  __device__ __forceinline__ void run() {
    float all[1][kN / 2];
    multiply<kN>(all, p.weights.k / kStageK, ring, place, false);
    const float (&acc)[kN / 2] = all[0];
    const int thread = threadIdx.x & 127, wg = threadIdx.x >> 7, lane = threadIdx.x & 31;
    // Row c of `out`: results of this column for the block's outputs.
    const u32 mine = tables.out + wg * 128 + (thread >> 5) * 32 + (lane >> 2) * 4;
    const int column = (lane & 3) * 2;
    barrier_wait(tables.scaled(), phase_of(place.number()));
    named_sync(1 + wg, 128);  // the last item's are read
#pragma unroll
    for (int a = 0; a < kN / 2; a += 4) {
      const int c = a * 2 + column;
      const uint2 scale = lds64(tables.scales + c * 4);
      const float s0 = __uint_as_float(scale.x), s1 = __uint_as_float(scale.y);
      sts32(mine + c * kOutStride, pack_bf16(acc[a] * s0, acc[a + 2] * s0));
      sts32(mine + (c + 1) * kOutStride, pack_bf16(acc[a + 1] * s1, acc[a + 3] * s1));
    }
  }

  // Results of tokens' only rows to where they belong, others to y: eight lanes a row, and the same
  // code for any number of columns.
  __device__ __forceinline__ void leave(const Slices& slices) {
    const int thread = threadIdx.x & 127, wg = threadIdx.x >> 7, piece = thread & 7;
    named_sync(1 + wg, 128);
    const int count = item().count, tile = item().block * kWgs + wg;
    const u32 from = tables.out + wg * 128 + piece * 16;
    u8* y = slices.buffer(p.y, item().slice, item().block) + wg * 128 + piece * 16;
#pragma unroll 4
    for (int c = thread >> 3; c < count; c += 16) {
      const uint4 owner = lds128(tables.owner(c));
      const uint4 v = lds128(from + c * kOutStride);
      const int slot = static_cast<int>(owner.w);
      if (slot >= 0) {
        *reinterpret_cast<uint4*>(y + static_cast<u64>(slot) * kRowBytes) = v;
      } else {
        store(p, static_cast<int>(owner.x), tile, piece, v);
      }
    }
  }
};

// A warp that adds up, tile after tile, what tokens' rows contribute to a block. It claims tiles
// and blocks in the order in which they are multiplied and waits for those before, so that it may
// fall behind where tokens have their last rows, and catch up later.
struct Adder {
  const PrefillDownParams& p;
  const Slices& slices;
  u32 cells, pairs, tokens;  // shared memory of this warp

  __device__ __forceinline__ static Adder of(const PrefillDownParams& p, const Slices& slices,
                                             u32 memory) {
    const u32 pairs = memory + kStreams * kCells * kRowBytes;
    return Adder{p, slices, memory, pairs, pairs + kMostPairs * 16};
  }

  __device__ __forceinline__ void run() {
    if (slices.slots == 0 && slices.count() <= 2) return;
    const Order order{p, slices};
    const int lane = threadIdx.x & 31;
    auto claim = [&] { return lane == 0 ? atomicAdd(p.summed, 1u) : 0; };
    for (u32 next = claim();;) {
      const Item item = order.item(__shfl_sync(0xffffffffu, next, 0));
      if (item.kind == kEnd) return;
      next = claim();
      wait_tiles(item);
      for (int first = 0; first < item.count; first += 32) {
        const Found found = find(item, first);
        add_up(item, found);
      }
      __syncwarp();  // all lanes have what they asked for
      if (slices.count() > 2 && lane == 0) {
        asm volatile("fence.acq_rel.gpu;" ::: "memory");
        asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(p.left + item.slice)
                     : "memory");
      }
    }
  }

  // Until what this tile and those before it have for y is there.
  __device__ __forceinline__ void wait_tiles(const Item& item) {
    const int tiles = item.step + 1, words = (tiles + 31) / 32;
    const u32* done = p.done + item.block * ((slices.tiles + 31) / 32);
    bool all;
    do {
      all = true;
#pragma unroll 1
      for (int w = threadIdx.x & 31; w < words; w += 32) {
        const u32 wanted = w < tiles / 32 ? 0xffffffffu : (1u << tiles % 32) - 1;
        u32 seen;
        asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(seen) : "l"(done + w) : "memory");
        all = all && (seen & wanted) == wanted;
      }
    } while (!__all_sync(0xffffffffu, all));
    __syncwarp();
  }

  // Contributions to those of 32 columns that are the last of their tokens, two at a time: where
  // each is in y, and its weight; behind a token's last two, which token it is. Returns how many
  // pairs there are, and how many of them are of the first 16 columns.
  struct Found {
    int half, all;
  };
  __device__ __forceinline__ Found find(const Item& item, int first) {
    const int lane = threadIdx.x & 31, row = item.first + first + lane;
    int count = 0, token = 0;
    if (first + lane < item.count) {
      const int4 owner = *reinterpret_cast<const int4*>(p.owners + row);
      token = owner.x, count = owner.w < 0 ? 0 : owner.z;
    }
    int end = (count + 1) / 2;
    for (int d = 1; d < 32; d <<= 1) {
      const int before = __shfl_up_sync(0xffffffffu, end, d);
      if (lane >= d) end += before;
    }
    const int begin = end - (count + 1) / 2;
    const u64 at = static_cast<u64>(row) * kMostParts;
    const uint4* parts = reinterpret_cast<const uint4*>(p.parts + at);
    __syncwarp();  // the last ones are read
#pragma unroll 1
    for (int i = begin; i < end; ++i) {
      uint4 two = parts[i - begin];
      two.y = weigh(two.y), two.w = weigh(two.w);
      // No second one: as if it weighed nothing. What weighs nothing is not read.
      if ((i - begin) * 2 + 1 == count) two.w = 0;
      sts128(pairs + i * 16, two);
      sts32(tokens + i * 4, i + 1 == end ? token : ~0u);
    }
    __syncwarp();
    return Found{__shfl_sync(0xffffffffu, end, 15), __shfl_sync(0xffffffffu, end, 31)};
  }
  __device__ __forceinline__ u32 weigh(u32 weight) const {
    return __float_as_uint(__uint_as_float(weight) * p.factor);
  }

  // Eight lanes for each row tile, and half a warp for half of the columns. Contributions are asked
  // for kCells / 2 pairs ahead.
  __device__ __forceinline__ void add_up(const Item& item, Found found) {
    const int half = threadIdx.x >> 4 & 1, lane = threadIdx.x & 15;
    if (lane >= row_tiles_of(p, item.block) * 8) return;
    const int begin = half == 0 ? 0 : found.half;
    const int count = half == 0 ? found.half : found.all - found.half;
    const u32 cells = this->cells + half * (kCells * kRowBytes) + lane * 16;
    const u32 pairs = this->pairs + begin * 16, tokens = this->tokens + begin * 4;
    const u8* y = slices.buffer(p.y, item.slice, item.block) + lane * 16;
    constexpr int kPairs = kCells / 2;
    auto ask = [&](int i) {
      if (i < count) {
        const uint4 two = lds128(pairs + i * 16);
        const u32 cell = cells + i % kPairs * (2 * kRowBytes);
        async_copy16(cell, y + static_cast<u64>(two.x) * kRowBytes);
        if (two.w != 0) async_copy16(cell + kRowBytes, y + static_cast<u64>(two.z) * kRowBytes);
      }
      async_copy_commit();
    };
#pragma unroll 1
    for (int i = 0; i < kPairs; ++i) ask(i);
    float total[8] = {};
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      async_copy_wait<kPairs - 1>();
      const u32 cell = cells + i % kPairs * (2 * kRowBytes);
      const uint4 two = lds128(pairs + i * 16), v0 = lds128(cell), v1 = lds128(cell + kRowBytes);
      const int token = static_cast<int>(lds32(tokens + i * 4));
      sum(total, v0, __uint_as_float(two.y));
      if (two.w != 0) sum(total, v1, __uint_as_float(two.w));
      ask(i + kPairs);
      if (token < 0) continue;
      u32 r[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) r[j] = pack_bf16(total[2 * j], total[2 * j + 1]);
      store(p, token, item.block * kWgs + (lane >> 3), lane & 7,
            make_uint4(r[0], r[1], r[2], r[3]));
#pragma unroll
      for (int j = 0; j < 8; ++j) total[j] = 0.0f;
    }
  }

  __device__ __forceinline__ static void sum(float (&total)[8], uint4 v, float weight) {
    const u32 w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      total[2 * e] += weight * bf16_low(w[e]);
      total[2 * e + 1] += weight * bf16_high(w[e]);
    }
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    w4a8_prefill_down(const __grid_constant__ PrefillDownParams p) {
  extern __shared__ __align__(128) u8 shared[];
  const Ring ring = make_ring(shared, p.ring, Tables::bytes(), kConsumers / 32 + 1);
  const Tables tables = Tables::at(ring.end);
  if (threadIdx.x == 0) tables.init();
  __syncthreads();
  pdl_wait();
  pdl_trigger();
  const Slices slices = Slices::of(p);
  if (threadIdx.x >= kConsumers) {
    give_registers();
    const int warp = (threadIdx.x - kConsumers) >> 5;
    if (warp == 0) {
      produce_stages(p.weights, queue, ring, PanelRows{p.b, p.b_rows});
      return;
    }
    if (warp == 1) {
      Clerk{p, slices, ring, tables, kDynamic ? 0.0f : *p.b_scale}.run();
    } else {
      Adder::of(p, slices, tables.adders + (warp - 2) * kAdderBytes).run();
    }
    return;
  }
  take_registers();
  DownBody body{p, ring, tables, CountingPlace{}};
  for (;;) {
    Reader reader{body.place.number()};
    const Item& item = reader.wait(queue, ring);
    if (uniform(item.kind) == kEnd) break;
    // A warpgroup without a row tile waits for the item's scales all the same: who arrives early
    // could count for the item before.
    if (uniform((item.block * kWgs + (threadIdx.x >> 7)) * 64 >= p.weights.rows)) {
      pass(p.weights.k / kStageK, ring, body.place, false);
      barrier_wait(tables.scaled(), phase_of(body.place.number()));
    } else {
      with_columns(item.count, body);
      body.leave(slices);
    }
    __syncwarp();
    if (kEveryLane || (threadIdx.x & 31) == 0) barrier_arrive(tables.stored());
    Reader{body.place.number()}.release(ring);
    body.place.next_item();
  }
  // Nobody multiplies any more, so the stages are free, and there are sums left.
  named_sync(kWgs + 1, kConsumers);
  const int warp = threadIdx.x >> 5;
  if (warp < ring.size * kStageBytes / kAdderBytes) {
    Adder::of(p, slices, ring.stages + warp * kAdderBytes).run();
  }
}
