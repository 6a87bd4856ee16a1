// What the card's memory delivers to shared memory: bulk copies, and nothing done with the bytes.
#include "primitives.cuh"

constexpr int kChunk = 16384, kRing = 6;

struct CeilingParams {
  const u8* data;
  int chunks;  // of 16 KB
};

extern "C" __global__ void __launch_bounds__(32)
    w4a8_ceiling(const __grid_constant__ CeilingParams p) {
  extern __shared__ __align__(128) u8 shared[];
  const u32 ring = smem_address(shared), bars = ring + kRing * kChunk;
  if (threadIdx.x != 0) return;
  for (int i = 0; i < kRing; ++i) barrier_init(bars + i * 8, 1);
  barrier_init_fence();
  const u64 policy = evict_first_policy();
  auto copy = [&](int chunk, int slot) {
    barrier_expect(bars + slot * 8, kChunk);
    bulk_copy(ring + slot * kChunk, p.data + static_cast<u64>(chunk) * kChunk, kChunk,
              bars + slot * 8, policy);
  };
  const int step = gridDim.x;
  int ahead = blockIdx.x;
  for (int i = 0; i < kRing && ahead < p.chunks; ++i, ahead += step) copy(ahead, i);
  int slot = 0;
  u32 phase = 0;
  for (int chunk = blockIdx.x; chunk < p.chunks; chunk += step) {
    barrier_wait(bars + slot * 8, phase);
    if (ahead < p.chunks) copy(ahead, slot), ahead += step;
    if (++slot == kRing) slot = 0, phase ^= 1;
  }
}
