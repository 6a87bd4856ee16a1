// Of prefill_down.cu: its arguments, what is claimed, and the warp that says what an item's rows
// are.
#pragma once
#include "prefill.cuh"
#include "prefill_lists.cuh"

constexpr bool kDynamic = W4_DYNAMIC != 0;
constexpr int kMostParts = W4_PARTS;  // contributions to a token, at most
constexpr int kOutBytes = kTokens * 128;  // of a warpgroup: 64 outputs of each token, BF16
constexpr int kOwnerBytes = kTokens * sizeof(Owner);
constexpr int kTableBytes = kOwnerBytes + kTokens * kMostParts * sizeof(Part);
constexpr int kTables = 3;  // of the item before, of this one, of the next
static_assert(kWgs == 3 && kPerWg == 1, "");

struct PrefillDownParams {
  Weights weights;
  const u8* b;            // (K / kPanel, b_rows, kPanel) E4M3, swizzled
  const Tile* tiles;      // (max_tiles)
  const int* header;      // (1) number of tiles
  const int* slots;       // (1) contributions that go through y
  const Owner* owners;    // (b_rows)
  const Part* parts;      // (b_rows, kMostParts)
  const int* part_tiles;  // (b_rows, kMostParts)
  const float* b_scale;   // static: (1); dynamic: (M * top_k)
  u8* y;                  // two slices of (per_slice, 3, slots, 128 bytes)
  u16* out;               // (M, rows) bfloat16; tokens without a row are not written
  u32* claimed;           // zero before
  u32* done;              // (max_tiles, blocks) warpgroups that have written to y; zero before
  u32* left;              // (slices) items' warpgroups that need y no more; zero before
  u64 y_bytes;            // at least two blocks for all slots
  float factor;
  int b_rows, ring;
};

// How outputs are cut; the same in all CTAs.
struct Slices {
  int blocks, tiles, slots, per_slice;

  __device__ __forceinline__ static Slices of(const PrefillDownParams& p) {
    const int blocks = (p.weights.rows / 64 + kWgs - 1) / kWgs, slots = *p.slots;
    const u64 block_bytes = max(static_cast<u64>(slots), 1ull) * (kWgs * 128);
    int most = blocks;
    if (block_bytes * blocks > p.y_bytes) most = static_cast<int>(p.y_bytes / (2 * block_bytes));
    const int slices = (blocks + most - 1) / most;
    return Slices{blocks, *p.header, slots, (blocks + slices - 1) / slices};
  }
  __device__ __forceinline__ int count() const { return (blocks + per_slice - 1) / per_slice; }
  __device__ __forceinline__ int blocks_of(int slice) const {
    return min(per_slice, blocks - slice * per_slice);
  }
  // Contributions of a row tile: 128 bytes for each slot.
  __device__ __forceinline__ u8* buffer(u8* y, int slice, int block, int wg) const {
    const u64 at = (slice % 2 * per_slice + block - slice * per_slice) * kWgs + wg;
    return y + at * (static_cast<u64>(slots) * 128);
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

// Shared memory behind the stages: results of each warpgroup, tables of items, their barriers.
struct Tables {
  u32 out, tables, bars;
  __device__ __forceinline__ static constexpr int bytes() {
    return kWgs * kOutBytes + kTables * kTableBytes + 128;
  }
  __device__ __forceinline__ u32 owner(int i, int column) const {
    return tables + i * kTableBytes + column * static_cast<int>(sizeof(Owner));
  }
  __device__ __forceinline__ u32 part(int i, int column) const {
    return tables + i * kTableBytes + kOwnerBytes +
           column * (kMostParts * static_cast<int>(sizeof(Part)));
  }
  __device__ __forceinline__ u32 full(int i) const { return bars + i * 24; }
  __device__ __forceinline__ u32 ready(int i) const { return bars + i * 24 + 8; }
  __device__ __forceinline__ u32 empty(int i) const { return bars + i * 24 + 16; }
};
// Those of a CTA's n-th item, and the parity of their barriers.
__device__ __forceinline__ int table_of(int n) { return n % kTables; }
__device__ __forceinline__ u32 phase_of(int n) { return n / kTables & 1; }

// One warp: tables of an item, and whether what they refer to is there.
__device__ __forceinline__ void produce_tables(const PrefillDownParams& p, const Queue& queue,
                                               const Ring& ring, const Tables& tables) {
  const int lane = threadIdx.x & 31;
  const int blocks = (p.weights.rows / 64 + kWgs - 1) / kWgs;
  Reader reader;
  for (int n = 0;; ++n) {
    const Item item = reader.next(queue, ring);
    if (item.kind == kEnd) return;
    const int i = table_of(n);
    barrier_wait(tables.empty(i), phase_of(n) ^ 1);
    const u64 first = item.first;
    if (lane == 0) {
      constexpr int kPartBytes = kMostParts * static_cast<int>(sizeof(Part));
      const int owner_bytes = item.count * static_cast<int>(sizeof(Owner));
      barrier_expect(tables.full(i), owner_bytes + item.count * kPartBytes);
      bulk_copy(tables.owner(i, 0), p.owners + first, owner_bytes, tables.full(i));
      bulk_copy(tables.part(i, 0), p.parts + first * kMostParts, item.count * kPartBytes,
                tables.full(i));
    }
    __syncwarp();
    barrier_wait(tables.full(i), phase_of(n));
    const u32 target = row_tiles_of(p, item.block);
    for (int c = lane; c < item.count; c += 32) {
      const uint4 owner = lds128(tables.owner(i, c));
      const int parts = static_cast<int>(owner.w) < 0 ? 0 : static_cast<int>(owner.z);
      for (int k = 0; k < parts; ++k) {
        const int tile = p.part_tiles[(first + c) * kMostParts + k];
        // A warpgroup reads of its own tile what it has written itself.
        if (tile == item.step) continue;
        const u32* done = p.done + static_cast<u64>(tile) * blocks + item.block;
        u32 seen;
        do {
          asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(seen) : "l"(done) : "memory");
        } while (seen < target);
      }
    }
    __syncwarp();
    if (kEveryLane || lane == 0) barrier_arrive(tables.ready(i));
  }
}
