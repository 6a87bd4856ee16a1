// Down of the prefill path: w2 times the FP8 products, and the sum over each token's experts.
//
// Rows of the list are (token, k) pairs sorted by expert. The result of a token's only row goes to
// its place at once. Those of tokens with several rows go through `y`, and the CTA that has the
// last of them adds up, in the order of k: results do not depend on timing. With expert parallelism
// most tokens have one row or two, so little goes through memory.
//
// Beside the consumers there are four warps: one fills the ring, one, the clerk, claims items and
// tells other CTAs what is done, and two wait for other tiles' results and add up while consumers
// are at the next items. They use few registers: what sums need comes to shared memory, where each
// lane reads what it has asked for itself.
//
// Items are claimed in order, and a tile waits for tiles with smaller numbers only, so that CTAs
// need not all be resident. Outputs are cut into slices of `per_slice` blocks of 192, tiles run
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
    float acc[kN / 2];
    multiply_one<kN>(acc, p.weights.k / kStageK, ring, place, false);
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
    const int n = place.number(), count = item().count, tile = item().block * kWgs + wg;
    const u32 from = tables.out + wg * 128 + piece * 16;
    u8* y = slices.buffer(p.y, item().slice, item().block) + wg * 128 + piece * 16;
#pragma unroll 4
    for (int c = thread >> 3; c < count; c += 16) {
      const uint4 owner = lds128(tables.owner(table_of(n), c));
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

// One of the two warps that add up; each has every other column.
struct Adder {
  const PrefillDownParams& p;
  const Ring& ring;
  const Tables& tables;
  const Slices& slices;

  __device__ __forceinline__ static const Item& item(int n) { return queue.item[n % kQueue]; }
  __device__ __forceinline__ static int which() { return threadIdx.x >> 5 & (kAdders - 1); }

  __device__ __forceinline__ void run() {
    for (int n = 0;; ++n) {
      if (Reader{n}.wait(queue, ring).kind == kEnd) return;
      barrier_wait(tables.full(n), table_phase(n));
      barrier_wait(tables.stored(n), table_phase(n));
      wait_tiles(n);
      add_up(n);
      Reader{n}.release(ring);
    }
  }

  // Until what tiles before this one have for y is there.
  __device__ __forceinline__ void wait_tiles(int n) {
    const int step = item(n).step, word = step / 32;
    const u32* done = p.done + item(n).block * ((slices.tiles + 31) / 32);
    bool all;
    do {
      all = true;
      for (int w = threadIdx.x & 31; w <= word; w += 32) {
        const u32 wanted = w < word ? 0xffffffffu : (1u << step % 32) - 1;
        u32 seen;
        asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(seen) : "l"(done + w) : "memory");
        all = all && (seen & wanted) == wanted;
      }
    } while (!__all_sync(0xffffffffu, all));
    __syncwarp();
  }

  // Which of 32 of this warp's columns are the last rows of their tokens: a bit for each.
  __device__ __forceinline__ u32 last_rows(int n, int half) const {
    const int c = (half * 32 + static_cast<int>(threadIdx.x & 31)) * kAdders + which();
    int parts = 0;
    if (c < item(n).count) {
      const uint4 owner = lds128(tables.owner(table_of(n), c));
      parts = static_cast<int>(owner.w) < 0 ? 0 : static_cast<int>(owner.z);
    }
    return __ballot_sync(0xffffffffu, parts > 0);
  }
  __device__ __forceinline__ static int column_of(u64 found) {
    return (__ffsll(static_cast<long long>(found)) - 1) * kAdders + which();
  }
  __device__ __forceinline__ void add_up(int n) {
    static_assert(kTokens == 64 * kAdders, "a bit for each column");
    const int lane = threadIdx.x & 31;
    const u64 found = last_rows(n, 0) | static_cast<u64>(last_rows(n, 1)) << 32;
    if (lane < row_tiles_of(p, item(n).block) * 8) add_found(n, found);
  }
  // The columns found, one after the other: eight lanes for each row tile. Contributions are asked
  // for kCells / 2 pairs ahead, as most sums have two.
  __device__ __forceinline__ void add_found(int n, u64 found) {
    const int lane = threadIdx.x & 31;
    const u8* y = slices.buffer(p.y, item(n).slice, item(n).block) + lane * 16;
    constexpr int kPairs = kCells / 2, kPartBytes = sizeof(Part);
    const u32 cells = tables.cells + which() * (kCells * kRowBytes) + lane * 16;
    u64 coming = found;
    u32 at = 0, end = 0;  // of the parts of the column that is asked for
    auto ask = [&](u32 cell) {
      if (at >= end && coming != 0) {
        const int c = column_of(coming);
        coming &= coming - 1;
        at = tables.part(table_of(n), c);
        end = at + lds32(tables.owner(table_of(n), c) + 8) * kPartBytes;
      }
      if (at < end) {
        const uint4 two = lds128(at);
        async_copy16(cell, y + static_cast<u64>(two.x) * kRowBytes);
        if (at + kPartBytes < end) {
          async_copy16(cell + kRowBytes, y + static_cast<u64>(two.z) * kRowBytes);
        }
        at += 2 * kPartBytes;
      }
      async_copy_commit();
    };
#pragma unroll 1
    for (int i = 0; i < kPairs; ++i) ask(cells + i * (2 * kRowBytes));
    u32 cell = cells;
#pragma unroll 1
    for (u64 rest = found; rest != 0; rest &= rest - 1) {
      const int c = column_of(rest);
      const uint4 owner = lds128(tables.owner(table_of(n), c));
      u32 part = tables.part(table_of(n), c);
      const u32 last = part + owner.z * kPartBytes;
      float total[8] = {};
#pragma unroll 1
      for (; part < last; part += 2 * kPartBytes) {
        async_copy_wait<kPairs - 1>();
        const uint4 two = lds128(part), v0 = lds128(cell), v1 = lds128(cell + kRowBytes);
        sum(total, v0, __uint_as_float(two.y));
        if (part + kPartBytes < last) sum(total, v1, __uint_as_float(two.w));
        ask(cell);
        cell += 2 * kRowBytes;
        if (cell == cells + kCells * kRowBytes) cell = cells;
      }
      u32 r[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        r[j] = pack_bf16(p.factor * total[2 * j], p.factor * total[2 * j + 1]);
      }
      store(p, static_cast<int>(owner.x), item(n).block * kWgs + (lane >> 3), lane & 7,
            make_uint4(r[0], r[1], r[2], r[3]));
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
  const Ring ring = make_ring(shared, p.ring, Tables::bytes());
  const Tables tables = Tables::at(ring.end);
  if (threadIdx.x == 0) tables.init();
  __syncthreads();
  pdl_wait();
  pdl_trigger();
  const Slices slices = Slices::of(p);
  if (threadIdx.x >= kConsumers) {
    give_registers<56>();
    const int warp = (threadIdx.x - kConsumers) >> 5;
    if (warp == 0) {
      produce_stages(p.weights, p.b, p.b_rows, queue, ring);
      return;
    }
    if (warp == 1) {
      Clerk{p, slices, ring, tables, kDynamic ? 0.0f : *p.b_scale}.run();
    } else {
      Adder{p, ring, tables, slices}.run();
    }
    return;
  }
  take_registers<152>();
  DownBody body{p, ring, tables, CountingPlace{}};
  for (;;) {
    Reader reader{body.place.number()};
    const Item& item = reader.wait(queue, ring);
    if (uniform(item.kind) == kEnd) break;
    // A warpgroup without a row tile waits for the item's scales all the same: who arrives early
    // could count for the item before.
    if (uniform((item.block * kWgs + (threadIdx.x >> 7)) * 64 >= p.weights.rows)) {
      pass(p.weights.k / kStageK, ring, body.place);
      barrier_wait(tables.scaled(), phase_of(body.place.number()));
    } else {
      with_columns(item.count, body);
      body.leave(slices);
    }
    __syncwarp();
    if (kEveryLane || (threadIdx.x & 31) == 0) barrier_arrive(tables.stored(body.place.number()));
    Reader{body.place.number()}.release(ring);
    body.place.next_item();
  }
}
