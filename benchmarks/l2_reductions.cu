// How fast an H100's L2 adds rows up: what a GEMM that combines its results in memory can hope for.
//
// Every case sends the same number of bytes to random rows of a region: `bulk` copies rows from shared
// memory (one instruction of one thread for each row), `lanes` sends registers, a row of `row` bytes
// by row / 16 (or row / 4) lanes. Stores of the same shapes stand beside them. Prints a JSON row each.
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#define CHECK(call)                                                              \
  do {                                                                           \
    cudaError_t e = (call);                                                      \
    if (e != cudaSuccess) {                                                      \
      fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(e));                 \
      exit(1);                                                                   \
    }                                                                            \
  } while (0)

enum Kind { kBulkStore, kBulkF32, kBulkS32, kBulkU64, kBulkBf16, kBulkF16,
            kStore, kRedF32, kRedBf16, kRedF16, kRedS32, kRedU64, kKinds };
const char* const kNames[kKinds] = {"bulk store", "bulk f32", "bulk s32", "bulk u64", "bulk bf16",
                                    "bulk f16", "lanes store", "lanes v4.f32", "lanes v4.bf16x2",
                                    "lanes v4.f16x2", "lanes s32", "lanes u64"};
constexpr int kRing = 4, kThreads = 256;
constexpr uint32_t kOnes = 0x3c003c00u;  // two 1.0 as F16, small as any of the others

__device__ __forceinline__ uint32_t mix(uint32_t x) {
  x ^= x >> 16, x *= 0x7feb352du, x ^= x >> 15, x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

template <int kKind>
__device__ __forceinline__ void bulk(uint8_t* to, uint32_t from, int bytes) {
#define BULK(op)                                                                             \
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add" op " [%0], [%1], %2;" \
               ::"l"(to), "r"(from), "r"(bytes) : "memory")
  if constexpr (kKind == kBulkStore)
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to),
                 "r"(from), "r"(bytes) : "memory");
  if constexpr (kKind == kBulkF32) BULK(".f32");
  if constexpr (kKind == kBulkS32) BULK(".s32");
  if constexpr (kKind == kBulkU64) BULK(".u64");
  if constexpr (kKind == kBulkBf16) BULK(".noftz.bf16");
  if constexpr (kKind == kBulkF16) BULK(".noftz.f16");
#undef BULK
}

// `rows` rows go to random places among `places`; a thread sends every kThreads-th of its CTA's.
template <int kKind>
__global__ void __launch_bounds__(kThreads) send_bulk(uint8_t* region, uint32_t places, int row,
                                                      int rows) {
  extern __shared__ __align__(128) uint8_t shared[];
  for (int i = threadIdx.x; i < kThreads * row / 4; i += kThreads) {
    reinterpret_cast<uint32_t*>(shared)[i] = kOnes;
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(shared)) + threadIdx.x * row;
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < rows; i += gridDim.x * kThreads) {
    bulk<kKind>(region + static_cast<uint64_t>(mix(i) % places) * row, from, row);
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kRing - 1) : "memory");
  }
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

template <int kKind>
__device__ __forceinline__ void lane_send(uint8_t* to) {
  const uint32_t v = kOnes;
  if constexpr (kKind == kStore)
    asm volatile("st.global.v4.u32 [%0], {%1,%1,%1,%1};" ::"l"(to), "r"(v) : "memory");
  if constexpr (kKind == kRedF32)
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1,%1,%1,%1};" ::"l"(to), "f"(__uint_as_float(v))
                 : "memory");
  if constexpr (kKind == kRedBf16)
    asm volatile("red.relaxed.gpu.global.add.noftz.v4.bf16x2 [%0], {%1,%1,%1,%1};" ::"l"(to),
                 "r"(v) : "memory");
  if constexpr (kKind == kRedF16)
    asm volatile("red.relaxed.gpu.global.add.noftz.v4.f16x2 [%0], {%1,%1,%1,%1};" ::"l"(to),
                 "r"(v) : "memory");
  if constexpr (kKind == kRedS32)
    asm volatile("red.relaxed.gpu.global.add.s32 [%0], %1;" ::"l"(to), "r"(v) : "memory");
  if constexpr (kKind == kRedU64)
    asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(to), "l"(static_cast<uint64_t>(v)) : "memory");
}

template <int kKind>
__global__ void __launch_bounds__(kThreads) send_lanes(uint8_t* region, uint32_t places, int row,
                                                       int rows) {
  constexpr int kBytes = kKind == kRedS32 ? 4 : kKind == kRedU64 ? 8 : 16;
  const int lanes = row / kBytes;  // of a row: at most 32
  const int piece = threadIdx.x % lanes, beside = kThreads / lanes;
  for (int i = blockIdx.x * beside + threadIdx.x / lanes; i < rows; i += gridDim.x * beside) {
    lane_send<kKind>(region + static_cast<uint64_t>(mix(i) % places) * row + piece * kBytes);
  }
}

template <int kKind>
void run(uint8_t* region, uint64_t region_bytes, int row, int per_sm, int sms) {
  constexpr bool kBulk = kKind < kStore;
  const int rows = static_cast<int>((1ull << 30) / row), ctas = sms * per_sm;
  const uint32_t places = static_cast<uint32_t>(region_bytes / row);
  const int shared = kBulk ? kThreads * row : 0;
  if (kBulk) {
    CHECK(cudaFuncSetAttribute(send_bulk<kKind>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               shared));
  }
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  float best = 1e9f, worst = 0.0f;
  for (int i = 0; i < 6; ++i) {
    CHECK(cudaEventRecord(begin));
    if constexpr (kBulk)
      send_bulk<kKind><<<ctas, kThreads, shared>>>(region, places, row, rows);
    else
      send_lanes<kKind><<<ctas, kThreads>>>(region, places, row, rows);
    CHECK(cudaEventRecord(end));
    CHECK(cudaEventSynchronize(end));
    float ms;
    CHECK(cudaEventElapsedTime(&ms, begin, end));
    if (i > 0) best = ms < best ? ms : best, worst = ms > worst ? ms : worst;
  }
  const double bytes = static_cast<double>(rows) * row;
  printf("{\"kind\": \"%s\", \"row_bytes\": %d, \"region_mb\": %.0f, \"ctas_per_sm\": %d, "
         "\"gb_s\": %.0f, \"slowest_gb_s\": %.0f}\n",
         kNames[kKind], row, region_bytes / 1048576.0, per_sm, bytes / best * 1e-6,
         bytes / worst * 1e-6);
  fflush(stdout);
}

template <int kKind>
void all(uint8_t* region, int sms) {
  const uint64_t mb = 1 << 20;
  const uint64_t regions[] = {4 * mb, 12 * mb, 24 * mb, 512 * mb};
  for (const uint64_t bytes : regions) {
    if constexpr (kKind < kStore) {
      for (const int row : {128, 256, 512}) run<kKind>(region, bytes, row, 1, sms);
    } else if constexpr (kKind == kRedS32 || kKind == kRedU64) {
      for (const int row : {32, 64, 128}) run<kKind>(region, bytes, row, 4, sms);
    } else {
      for (const int row : {64, 128, 512}) run<kKind>(region, bytes, row, 4, sms);
    }
  }
  if constexpr (kKind + 1 < kKinds) all<kKind + 1>(region, sms);
}

// What a ring of slices costs that all CTAs write and read: in each step a CTA writes its share of a
// slice and reads somebody else's share of the one before. Nothing waits for a buffer to be free, as
// only the traffic counts. `hint`: 0 none, 1 evict_last for both, 2 reads of 1 that discard lines.
constexpr int kRingThreads = 512;
template <int kHint>
__global__ void __launch_bounds__(kRingThreads) ring(uint8_t* region, uint64_t slice, int buffers,
                                                     int steps, uint32_t* counts, uint32_t* sink) {
  const uint64_t share = slice / gridDim.x / (kRingThreads * 16) * (kRingThreads * 16);
  const uint64_t mine = blockIdx.x * share + threadIdx.x * 16;
  const uint64_t other = (blockIdx.x + gridDim.x / 2) % gridDim.x * share + threadIdx.x * 16;
  uint64_t policy = 0;
  if (kHint) asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  uint32_t sum = 0;
  for (int step = 0; step < steps; ++step) {
    uint8_t* to = region + step % buffers * slice + mine;
#pragma unroll 4
    for (uint64_t at = 0; at < share; at += kRingThreads * 16) {
      if constexpr (kHint)
        asm volatile("st.global.L2::cache_hint.v4.u32 [%0], {%1,%1,%1,%1}, %2;" ::"l"(to + at),
                     "r"(step), "l"(policy) : "memory");
      else
        asm volatile("st.global.v4.u32 [%0], {%1,%1,%1,%1};" ::"l"(to + at), "r"(step) : "memory");
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      asm volatile("fence.acq_rel.gpu;\nred.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(counts + step)
                   : "memory");
      uint32_t seen = 0;
      while (step > 0 && seen < gridDim.x) {
        asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(seen) : "l"(counts + step - 1) : "memory");
      }
    }
    __syncthreads();
    if (step == 0) continue;
    uint8_t* from = region + (step - 1) % buffers * slice + other;
#pragma unroll 4
    for (uint64_t at = 0; at < share; at += kRingThreads * 16) {
      const uint4 v = __ldcg(reinterpret_cast<const uint4*>(from + at));
      sum += v.x ^ v.y ^ v.z ^ v.w;
    }
    if constexpr (kHint == 2) {
      for (uint64_t at = 0; at < share; at += kRingThreads * 16) {
        if (threadIdx.x % 8 == 0) {
          asm volatile("discard.global.L2 [%0], 128;" ::"l"(from + at) : "memory");
        }
      }
    }
  }
  if (sum == 0x12345678u) *sink = sum;
}

template <int kHint>
void run_ring(uint8_t* region, int slice_mb, int buffers, int sms) {
  const uint64_t slice = static_cast<uint64_t>(slice_mb) << 20;
  const int steps = 1024 / slice_mb;
  uint32_t* counts;
  CHECK(cudaMalloc(&counts, (steps + 1) * 4));
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  float best = 1e9f;
  for (int i = 0; i < 4; ++i) {
    CHECK(cudaMemset(counts, 0, (steps + 1) * 4));
    CHECK(cudaEventRecord(begin));
    ring<kHint><<<sms, kRingThreads>>>(region, slice, buffers, steps, counts, counts + steps);
    CHECK(cudaEventRecord(end));
    CHECK(cudaEventSynchronize(end));
    float ms;
    CHECK(cudaEventElapsedTime(&ms, begin, end));
    best = ms < best ? ms : best;
  }
  CHECK(cudaFree(counts));
  const uint64_t share = slice / sms / (kRingThreads * 16) * (kRingThreads * 16);
  printf("{\"kind\": \"ring, %s\", \"slice_mb\": %d, \"buffers\": %d, \"gb_s_each_way\": %.0f}\n",
         kHint == 0 ? "no hint" : kHint == 1 ? "evict_last" : "evict_last, discarded", slice_mb,
         buffers, static_cast<double>(share) * sms * steps / best * 1e-6);
  fflush(stdout);
}

int main() {
  int sms;
  CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
  uint8_t* region;
  CHECK(cudaMalloc(&region, 512u << 20));
  CHECK(cudaMemset(region, 0, 512u << 20));
  all<0>(region, sms);
  for (const int slice_mb : {2, 4, 8, 16, 64}) {
    for (const int buffers : {2, 4}) {
      run_ring<0>(region, slice_mb, buffers, sms);
      run_ring<1>(region, slice_mb, buffers, sms);
      run_ring<2>(region, slice_mb, buffers, sms);
    }
  }
}
