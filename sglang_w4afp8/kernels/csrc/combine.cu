// Last kernel of the large-batch path: out[t] = factor * sum_k weight[t, k] * y[t * top_k + k].
//
// One thread owns 8 columns of one token and adds the experts in k order, in FP32.
#include "primitives.cuh"

constexpr int kThreads = 128;
constexpr int kAtOnce = 8;

struct CombineParams {
  const u16* y;          // (M * top_k, hidden) bfloat16; rows of skipped pairs are never read
  const float* weights;  // (M, top_k)
  const void* ids;       // (M, top_k) int32 or int64
  u16* out;              // (M, hidden) bfloat16
  float factor;
  int hidden, top_k, experts, ids_are_64;
};

extern "C" __global__ void __launch_bounds__(kThreads)
    w4a8_combine(const __grid_constant__ CombineParams p) {
  const int token = blockIdx.x;
  const int column = (blockIdx.y * kThreads + threadIdx.x) * 8;
  float sum[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) sum[i] = 0.0f;
  for (int first = 0; first < p.top_k; first += kAtOnce) {
    // Routing is older than the kernel in front; only y has to be waited for.
    float weight[kAtOnce];
    bool used[kAtOnce];
    uint4 v[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int pair = token * p.top_k + first + k;
      used[k] = first + k < p.top_k;
      if (!used[k]) continue;
      const long long id = p.ids_are_64 ? static_cast<const long long*>(p.ids)[pair]
                                        : static_cast<const int*>(p.ids)[pair];
      weight[k] = p.weights[pair];
      used[k] = id >= 0 && id < p.experts && column < p.hidden;
    }
    if (first == 0) {
      pdl_wait();
      pdl_trigger();
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const u64 pair = static_cast<u64>(token) * p.top_k + first + k;
      if (used[k]) v[k] = __ldcg(reinterpret_cast<const uint4*>(p.y + pair * p.hidden + column));
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (!used[k]) continue;
      const u32 w[4] = {v[k].x, v[k].y, v[k].z, v[k].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum[2 * i] += weight[k] * bf16_low(w[i]);
        sum[2 * i + 1] += weight[k] * bf16_high(w[i]);
      }
    }
  }
  if (column >= p.hidden) return;
  u32 r[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) r[i] = pack_bf16(p.factor * sum[2 * i], p.factor * sum[2 * i + 1]);
  *reinterpret_cast<uint4*>(p.out + static_cast<u64>(token) * p.hidden + column) =
      make_uint4(r[0], r[1], r[2], r[3]);
}
