// Of prefill_down.cu: its arguments, what is claimed, and two warps beside the consumers: one
// fills the ring, and one claims items, fetches their tables and publishes what is done.
#pragma once
#include "prefill.cuh"
#include "prefill_lists.cuh"

constexpr bool kDynamic = W4_DYNAMIC != 0;
constexpr int kMostParts = W4_PARTS;  // contributions to a token, at most
constexpr int kOwnerBytes = kTokens * sizeof(Owner);
constexpr int kRowBytes = kWgs * 128;  // what a row of the list contributes to a block, BF16
// Results in shared memory: a row for each column. Rows begin four banks apart, so that what a warp
// writes at once, 16 outputs of every other of eight columns, is in as many banks.
constexpr int kOutStride = kRowBytes + 16;
constexpr int kOutBytes = kTokens * kOutStride;
constexpr int kAdders = 2;
constexpr int kAhead = 1;   // items that are known before the first one begins
constexpr int kStreams = 2;  // halves of an adder, each with columns of its own
constexpr int kCells = 12;   // contributions that a half has asked for
constexpr int kMostPairs = 32 * (kMostParts / 2);  // of contributions to 32 tokens
constexpr int kAdderBytes = kStreams * kCells * kRowBytes + kMostPairs * 20;
static_assert(kSorted && kWgs == 2 && kMostParts % 2 == 0, "");

struct PrefillDownParams {
  Weights weights;
  const u8* b;            // (K / kPanel, b_rows, kPanel) E4M3, swizzled
  const Tile* tiles;      // (max_tiles)
  const int* header;      // (1) number of tiles
  const int* slots;       // (1) contributions that go through y
  const Owner* owners;    // (b_rows)
  const Part* parts;      // (b_rows, kMostParts)
  const float* b_scale;   // static: (1); dynamic: (M * top_k)
  u8* y;                  // two slices of (per_slice, slots, kRowBytes)
  u16* out;               // (M, rows) bfloat16; tokens without a row are not written
  u32* claimed;           // zero before
  u32* summed;            // claims of those who add up; zero before
  u32* done;              // (blocks, tiles / 32) bits: what a tile has for y is there; zero before
  u32* left;              // (slices) items whose sums are done; zero before
  u64 y_bytes;            // at least two blocks for all slots
  float factor;
  int b_rows, ring;
};

// How outputs are cut; the same in all CTAs.
struct Slices {
  int blocks, tiles, slots, per_slice;

  __device__ __forceinline__ static Slices of(const PrefillDownParams& p) {
    const int blocks = (p.weights.rows / 64 + kWgs - 1) / kWgs, slots = *p.slots;
    const u64 block_bytes = max(static_cast<u64>(slots), 1ull) * kRowBytes;
    int most = blocks;
    if (block_bytes * blocks > p.y_bytes) most = static_cast<int>(p.y_bytes / (2 * block_bytes));
    const int slices = (blocks + most - 1) / most;
    return Slices{blocks, *p.header, slots, (blocks + slices - 1) / slices};
  }
  __device__ __forceinline__ int count() const { return (blocks + per_slice - 1) / per_slice; }
  __device__ __forceinline__ int blocks_of(int slice) const {
    return min(per_slice, blocks - slice * per_slice);
  }
  // Contributions to a block: kRowBytes for each slot.
  __device__ __forceinline__ u8* buffer(u8* y, int slice, int block) const {
    const u64 at = slice % 2 * per_slice + block - slice * per_slice;
    return y + at * (static_cast<u64>(slots) * kRowBytes);
  }
};
__device__ __forceinline__ int row_tiles_of(const PrefillDownParams& p, int block) {
  return min(kWgs, p.weights.rows / 64 - block * kWgs);
}

// What is claimed, in order: the blocks of a slice for one tile after the other.
struct Order {
  const PrefillDownParams& p;
  Slices slices;

  __device__ __forceinline__ Item item(int number) const {
    Item item{};
    const int whole = slices.tiles * slices.per_slice;
    const int slice = whole > 0 ? number / whole : 0, at = number - slice * whole;
    if (whole == 0 || slice >= slices.count()) return item;
    const int blocks = slices.blocks_of(slice), i = at / blocks;
    if (i >= slices.tiles) return item;
    const Tile tile = p.tiles[i];
    item.kind = kMatrix, item.expert = tile.expert, item.first = tile.first;
    item.count = tile.count, item.slice = slice, item.step = i;
    item.block = slice * slices.per_slice + at % blocks;
    return item;
  }
};

__shared__ Queue queue;

// Of a CTA's n-th item.
__device__ __forceinline__ u32 phase_of(int n) { return n & 1; }

// Shared memory behind the stages: results of the warpgroups, to whom an item's columns belong,
// what the warps have that add up, columns' scales, and barriers.
struct Tables {
  u32 out, owners, adders, scales, bars;
  __device__ __forceinline__ static constexpr int bytes() {
    return kOutBytes + kOwnerBytes + kAdders * kAdderBytes + kTokens * 4 + 128;
  }
  __device__ __forceinline__ static Tables at(u32 begin) {
    const u32 owners = begin + kOutBytes, adders = owners + kOwnerBytes;
    const u32 scales = adders + kAdders * kAdderBytes;
    return Tables{begin, owners, adders, scales, scales + kTokens * 4};
  }
  __device__ __forceinline__ u32 owner(int column) const {
    return owners + column * static_cast<int>(sizeof(Owner));
  }
  __device__ __forceinline__ u32 scaled() const { return bars; }  // columns' scales are there
  __device__ __forceinline__ u32 full() const { return bars + 8; }    // owners are
  __device__ __forceinline__ u32 stored() const { return bars + 16; }  // results are in memory
  __device__ __forceinline__ void init() const {
    barrier_init(scaled(), kLanes);
    barrier_init(full(), 1);
    barrier_init(stored(), kConsumers / 32 * kLanes);
    barrier_init_fence();
  }
};

// ---- the ring -----------------------------------------------------------------------------------
// Rows of q, (k / kPanel, rows, kPanel): a copy for each panel of a stage.
struct PanelRows {
  static constexpr int kCopies = kStageK / kPanel, kReads = 1;
  const u8* q;
  int rows;
  __device__ __forceinline__ void wait(const Item&) const {}
  __device__ __forceinline__ u32 bytes(const Item& item) const { return item.count * kStageK; }
  __device__ __forceinline__ Copy copy(const Item& item, u32 panel) const {
    const u8* from = q + (static_cast<u64>(panel) * rows + item.first) * kPanel;
    return Copy{from, panel * (kTokens * kPanel), static_cast<u32>(item.count * kPanel)};
  }
  __device__ __forceinline__ u32 next(int) const { return rows * kStageK; }
};

// ---- claims, tables, flags ----------------------------------------------------------------------
// One warp. What it waits for are this CTA's items in their order, of which none needs what comes
// after it here, and sums of slices before, which wait for items with smaller numbers. So the item
// with the smallest number of those that are not finished can always be, and nobody waits for ever.
struct Clerk {
  const PrefillDownParams& p;
  const Slices& slices;
  const Ring& ring;
  const Tables& tables;
  float b_scale;       // static
  int free_below = 0;  // slices whose part of y may be written

  __device__ __forceinline__ static int lane() { return threadIdx.x & 31; }
  __device__ __forceinline__ static const Item& item(int n) { return queue.item[n % kQueue]; }

  __device__ __forceinline__ void run() {
    const Order order{p, slices};
    int posted = 0, items = 0x7fffffff;  // as long as the last one is not known
    auto post = [&] {
      if (posted > items) return;
      const u32 bar = ring.queue_bars + posted % kQueue * 16;
      barrier_wait(bar + 8, (posted / kQueue & 1) ^ 1);
      __syncwarp();  // a lane that fell a round behind could not tell the phases apart
      if (lane() == 0) {
        queue.item[posted % kQueue] = order.item(atomicAdd(p.claimed, 1u));
        barrier_arrive(bar);
      }
      __syncwarp();
      if (item(posted).kind == kEnd) items = posted;
      ++posted;
    };
    for (int i = 0; i < kAhead; ++i) post();
    for (int n = 0; n < items; ++n) {
      post();
      fetch(n);
      scale(n);
      publish(n);
    }
  }

  // Says that the item's results are in memory.
  __device__ __forceinline__ void publish(int n) {
    barrier_wait(tables.stored(), phase_of(n));
    if (lane() == 0) {
      asm volatile("fence.acq_rel.gpu;" ::: "memory");
      const int step = item(n).step;
      u32* done = p.done + item(n).block * ((slices.tiles + 31) / 32);
      asm volatile("red.relaxed.gpu.global.or.b32 [%0], %1;" ::"l"(done + step / 32),
                   "r"(1u << step % 32)
                   : "memory");
    }
    __syncwarp();
  }

  // An item's owners, when its results may be written. Those of the one before are done with.
  __device__ __forceinline__ void fetch(int n) {
    wait_slice(item(n).slice);
    if (lane() == 0) {
      const int bytes = item(n).count * static_cast<int>(sizeof(Owner));
      barrier_expect(tables.full(), bytes);
      bulk_copy(tables.owner(0), p.owners + item(n).first, bytes, tables.full());
    }
    __syncwarp();
  }

  // What results of each column are multiplied with: that of a token's only row is its output.
  __device__ __forceinline__ void scale(int n) {
    barrier_wait(tables.full(), phase_of(n));
    const int count = item(n).count;
#pragma unroll
    for (int c = lane(); c < kTokens; c += 32) {
      float by = 0.0f;
      if (c < count) {
        const uint4 owner = lds128(tables.owner(c));
        by = (kDynamic ? p.b_scale[owner.y] : b_scale) * 512.0f;
        if (static_cast<int>(owner.w) < 0) by *= __uint_as_float(owner.z) * p.factor;
      }
      sts32(tables.scales + c * 4, __float_as_uint(by));
    }
    __syncwarp();
    if (kEveryLane || lane() == 0) barrier_arrive(tables.scaled());
  }

  // Until all sums of the last slice but one are done.
  __device__ __forceinline__ void wait_slice(int slice) {
    if (slice < 2 || free_below > slice - 2) return;
    const u32 target = slices.tiles * slices.blocks_of(slice - 2);
    u32 seen;
    do {
      asm volatile("ld.acquire.gpu.u32 %0, [%1];"
                   : "=r"(seen)
                   : "l"(p.left + slice - 2)
                   : "memory");
    } while (seen < target);
    free_below = slice - 1;
    __syncwarp();
  }
};
