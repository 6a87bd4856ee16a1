// Down of the prefill path: w2 times the FP8 products, and the sum over each token's experts.
//
// Rows of the list are (token, k) pairs sorted by expert. The result of a token's only row goes to
// its place at once. Those of tokens with several rows go through `y`, and the CTA that has the
// last of them adds up, in the order of k: results do not depend on timing. It does so while it
// writes the results of its next item, when they have long been there, and asks for them before it
// writes. With expert parallelism most tokens have one row or two, so little goes through memory.
//
// Items are claimed in order, and a tile waits for tiles with smaller numbers only, so that CTAs
// need not all be resident. Outputs are cut into slices of `per_slice` blocks of 192, tiles run
// inside slices, and y holds two slices: what a slice writes takes the place of what the last but
// one did.
//
// W4_PANEL of prefill_up.cu is this kernel's kPanel. W4_DYNAMIC: q has a scale for each pair.
#include "prefill_tables.cuh"

// What a warp remembers between items, in shared memory, as registers are short: which outputs it
// has still to add up, of the item before, and the slices whose part of y may be written.
struct Memory {
  int slice, block, count, free_below;  // slice: -1 where there is nothing
};
__shared__ Memory memories[kConsumers / 32];

struct DownBody {
  const PrefillDownParams& p;
  const Ring& ring;
  const Tables& tables;
  const Slices& slices;
  Reader reader;
  Place place;

  __device__ __forceinline__ static Memory& before() { return memories[threadIdx.x >> 5]; }
  // A whole warp writes what a whole warp reads.
  __device__ __forceinline__ static void remember(int slice, int block, int count) {
    __syncwarp();
    before().slice = slice, before().block = block, before().count = count;
    __syncwarp();
  }
  __device__ __forceinline__ int table() const { return table_of(reader.number); }
  __device__ __forceinline__ int table_before() const { return table_of(reader.number - 1); }
  // Read again after the loop over K.
  __device__ __forceinline__ const Item& item() const { return queue.item[reader.number % kQueue]; }

  template <int kN>
  __device__ __forceinline__ void run() {
    float acc[kN / 2];
    multiply_one<kN>(acc, p.weights.k / kStageK, ring, place, false);
    const int thread = threadIdx.x & 127, wg = threadIdx.x >> 7, lane = threadIdx.x & 31;
    const u32 out = tables.out + wg * kOutBytes;
    barrier_wait(tables.full(table()), phase_of(reader.number));
    // Row c of `out`: 64 outputs, 16-byte piece j at j ^ (c % 8).
    const float b_scale = kDynamic ? 0.0f : *p.b_scale * 512.0f;
    const u32 mine = (thread >> 5) * 32 + (lane >> 2) * 4;
#pragma unroll
    for (int a = 0; a < kN / 2; a += 4) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int c = a * 2 + (lane & 3) * 2 + e;
        float scale = b_scale;
        if constexpr (kDynamic) {
          const int pair = static_cast<int>(lds32(tables.owner(table(), c) + 4));
          scale = c < item().count ? p.b_scale[pair] * 512.0f : 0.0f;
        }
        sts32(out + c * 128 + (mine ^ ((c & 7) * 16)),
              pack_bf16(acc[a + e] * scale, acc[a + e + 2] * scale));
      }
    }
  }

  // What happens to the results: the same code for any number of columns, as instructions that are
  // fetched once for each item are slow.
  __device__ __forceinline__ void finish_item() {
    const int thread = threadIdx.x & 127, wg = threadIdx.x >> 7;
    const u32 out = tables.out + wg * kOutBytes;
    const Coming coming = ask();
    wait_slice();
    named_sync(1 + wg, 128);
    leave(out);
    add_up(coming);
    named_sync(1 + wg, 128);
    if (thread == 0) {
      asm volatile("fence.acq_rel.gpu;" ::: "memory");
      add(p.done + static_cast<u64>(item().step) * slices.blocks + item().block);
      if (before().slice >= 0 && slices.count() > 2) add(p.left + before().slice);
    }
    remember(item().slice, item().block, item().count);
  }

  // The sums of the item before, without waiting for the next one's results.
  __device__ __forceinline__ void settle() {
    if (uniform(before().slice) < 0) return;
    add_up(ask());
    named_sync(1 + (threadIdx.x >> 7), 128);
    if ((threadIdx.x & 127) == 0 && slices.count() > 2) {
      asm volatile("fence.acq_rel.gpu;" ::: "memory");
      add(p.left + before().slice);
    }
    remember(-1, 0, 0);
  }
  // An item of which this warpgroup has no rows. It reads no table, and waits all the same: an early
  // arrival could count for what the table held before.
  __device__ __forceinline__ void skip() {
    pass(p.weights.k / kStageK, ring, place);
    barrier_wait(tables.ready(table()), phase_of(reader.number));
    __syncwarp();
    if (kEveryLane || (threadIdx.x & 31) == 0) barrier_arrive(tables.empty(table()));
  }

  __device__ __forceinline__ static void add(u32* count) {
    asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(count) : "memory");
  }

  // Until all that have to do with the last slice but one are through.
  __device__ __forceinline__ void wait_slice() {
    const int slice = uniform(item().slice);
    if (slice < 2 || uniform(before().free_below) > slice - 2) return;
    const u32 target = slices.tiles * min(slices.blocks_of(slice - 2) * kWgs,
                                          p.weights.rows / 64 -
                                              (slice - 2) * slices.per_slice * kWgs);
    u32 seen;
    do {
      asm volatile("ld.acquire.gpu.u32 %0, [%1];"
                   : "=r"(seen)
                   : "l"(p.left + slice - 2)
                   : "memory");
    } while (static_cast<u32>(uniform(seen)) < target);
    __syncwarp();
    before().free_below = slice - 1;
    __syncwarp();
  }

  // Eight lanes a row: results of tokens' only rows to where they belong, others to y.
  __device__ __forceinline__ void leave(u32 out) {
    const int thread = threadIdx.x & 127, wg = threadIdx.x >> 7, piece = thread & 7;
    u8* y = slices.buffer(p.y, item().slice, item().block, wg) + piece * 16;
    const int count = item().count, tile = item().block * kWgs + wg;
#pragma unroll 4
    for (int c = thread >> 3; c < count; c += 16) {
      const uint4 owner = lds128(tables.owner(table(), c));
      const int slot = static_cast<int>(owner.w);
      const uint4 v = lds128(out + c * 128 + ((piece ^ (c & 7)) * 16));
      if (slot >= 0) {
        *reinterpret_cast<uint4*>(y + static_cast<u64>(slot) * 128) = v;
      } else {
        float total[8] = {};
        sum(total, v, __uint_as_float(owner.z));
        store(static_cast<int>(owner.x), tile, piece, total);
      }
    }
  }

  // Columns of the item before that are the last rows of their tokens. A warp looks through 32, and
  // eight lanes take one of those found. What the first of them need is asked for while registers
  // of the sums are free for it, and arrives while other results are written.
  static constexpr int kRounds = 2, kAtOnce = 4;
  struct Coming {
    u32 found;  // bits of the warp's columns
    uint4 v[kRounds][kAtOnce];
  };
  __device__ __forceinline__ static int column_of(u32 found, int number) {
    for (int j = 0; j < number; ++j) found &= found - 1;
    return found != 0 ? static_cast<int>(threadIdx.x & 96) + __ffs(found) - 1 : -1;
  }
  __device__ __forceinline__ int parts_of(int column) const {
    if (column < 0 || column >= before().count) return 0;
    const uint4 owner = lds128(tables.owner(table_before(), column));
    return static_cast<int>(owner.w) < 0 ? 0 : static_cast<int>(owner.z);
  }
  __device__ __forceinline__ const u8* parts_at() const {
    return slices.buffer(p.y, before().slice, before().block, threadIdx.x >> 7) +
           (threadIdx.x & 7) * 16;
  }
  __device__ __forceinline__ uint4 load_part(const u8* y, int column, int k, bool wanted) const {
    u32 slot = 0;
    if (wanted) slot = lds32(tables.part(table_before(), column) + k * 8);
    return load_if(wanted, y + static_cast<u64>(slot) * 128);
  }
  __device__ __forceinline__ Coming ask() const {
    Coming coming;
    if (before().slice >= 0) {
      barrier_wait(tables.ready(table_before()), phase_of(reader.number - 1));
    }
    coming.found = __ballot_sync(0xffffffffu, parts_of(threadIdx.x & 127) > 0);
    const u8* y = parts_at();
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int c = column_of(coming.found, r * 4 + ((threadIdx.x & 31) >> 3));
      const int parts = parts_of(c);
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) coming.v[r][k] = load_part(y, c, k, k < parts);
    }
    return coming;
  }
  // Then the item's table may be written again.
  __device__ __forceinline__ void add_up(const Coming& coming) {
    if (before().slice < 0) return;
    const int number = (threadIdx.x & 31) >> 3;
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int c = column_of(coming.found, r * 4 + number);
      if (c >= 0) add_one(c, coming.v[r], kAtOnce);
    }
    u32 rest = coming.found;
    for (int j = 0; j < kRounds * 4; ++j) rest &= rest - 1;
    while (rest != 0) {
      const int c = column_of(rest, number);
      if (c >= 0) add_one(c, coming.v[0], 0);
      for (int j = 0; j < 4; ++j) rest &= rest - 1;
    }
    __syncwarp();
    if (kEveryLane || (threadIdx.x & 31) == 0) barrier_arrive(tables.empty(table_before()));
  }
  // `asked`: of v.
  __device__ __forceinline__ void add_one(int c, const uint4 (&v)[kAtOnce], int asked) {
    const int parts = parts_of(c), piece = threadIdx.x & 7;
    const u8* y = parts_at();
    float total[8] = {};
    auto one = [&](int k, uint4 value) {
      sum(total, value, __uint_as_float(lds32(tables.part(table_before(), c) + k * 8 + 4)));
    };
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (k < parts && k < asked) one(k, v[k]);
    }
    for (int k = asked; k < parts; ++k) one(k, load_part(y, c, k, true));
    const int token = static_cast<int>(lds32(tables.owner(table_before(), c)));
    store(token, before().block * kWgs + (threadIdx.x >> 7), piece, total);
  }

  // 16 bytes from L2, or zeros.
  __device__ __forceinline__ static uint4 load_if(bool wanted, const u8* from) {
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

  __device__ __forceinline__ static void sum(float (&total)[8], uint4 v, float weight) {
    const u32 w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      total[2 * e] += weight * bf16_low(w[e]);
      total[2 * e + 1] += weight * bf16_high(w[e]);
    }
  }

  // Eight outputs of a token, at their rows (hopper/layout.py, _row_order).
  __device__ __forceinline__ void store(int token, int tile, int piece, const float (&total)[8]) {
    u32 r[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      r[j] = pack_bf16(p.factor * total[2 * j], p.factor * total[2 * j + 1]);
    }
    u16* out = p.out + static_cast<u64>(token) * p.weights.rows;
    if constexpr (kLayoutTiles == 1) {
      *reinterpret_cast<uint4*>(out + tile * 64 + piece * 8) = make_uint4(r[0], r[1], r[2], r[3]);
    } else {
      const int row = tile / kLayoutTiles * kLayoutTiles * 64 + tile % kLayoutTiles * 2;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        *reinterpret_cast<u32*>(out + row + (piece * 4 + j) * 2 * kLayoutTiles) = r[j];
      }
    }
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    w4a8_prefill_down(const __grid_constant__ PrefillDownParams p) {
  extern __shared__ __align__(128) u8 shared[];
  const Ring ring = make_ring(shared, p.ring, Tables::bytes());
  const Tables tables{ring.end, ring.end + kWgs * kOutBytes,
                      ring.end + kWgs * kOutBytes + kTables * kTableBytes};
  if (threadIdx.x == 0) {
    for (int i = 0; i < kTables; ++i) {
      barrier_init(tables.full(i), 1);
      barrier_init(tables.ready(i), kLanes);
      barrier_init(tables.empty(i), kConsumers / 32 * kLanes);
    }
    barrier_init_fence();
  }
  __syncthreads();
  pdl_wait();
  pdl_trigger();
  const Slices slices = Slices::of(p);
  if (threadIdx.x >= kConsumers) {
    give_registers();
    const int warp = (threadIdx.x - kConsumers) >> 5;
    if (warp == 0) {
      produce_tiles(p.weights, queue, ring);
    } else if (warp == 1) {
      if ((threadIdx.x & 31) != 0) return;
      const Order order{p, slices};
      claim(queue, ring, p.claimed, [&](u32 number) { return order.item(number); });
    } else if (warp == 2) {
      produce_rows<false>(p.b, p.weights.k, p.b_rows, queue, ring);
    } else {
      produce_tables(p, queue, ring, tables);
    }
    return;
  }
  take_registers();
  memories[threadIdx.x >> 5] = Memory{-1, 0, 0, 0};
  __syncwarp();
  DownBody body{p, ring, tables, slices, Reader{}, Place{}};
  for (;;) {
    const Item& item = body.reader.wait(queue, ring);
    if (uniform(item.kind) == kEnd) break;
    const bool idle = (item.block * kWgs + (threadIdx.x >> 7)) * 64 >= p.weights.rows;
    // Whoever is about to write to a slice's part of y must not be who others wait for there.
    if (uniform(idle || item.slice > memories[threadIdx.x >> 5].slice + 1)) body.settle();
    if (uniform(idle)) {
      body.skip();
    } else {
      with_columns(item.count, body);
      body.finish_item();
    }
    body.reader.release(ring);
  }
  body.settle();
}
