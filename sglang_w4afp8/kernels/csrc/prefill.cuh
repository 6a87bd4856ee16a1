// What the two matrix kernels of the prefill path share: the loop over K. Who fills the ring for
// it: prefill_produce.cuh.
//
// A work item is a tile of at most 128 tokens of one expert, or of 192 in the order of the list,
// times 128 or 256 rows of weights: two consumer warpgroups, each with W4_PER_WG row tiles of 64
// rows, see the same tokens. The number of columns is chosen per item, in steps of 16 or 8: a tile
// computes no more than its tokens need. Items are claimed from a counter in their order, so that
// an item may wait for earlier ones without all CTAs being resident; results do not depend on who
// claims what.
#pragma once
#include "mma_wide.cuh"
#include "prefill_produce.cuh"

// This thread's codes of one scale group, and its two row scales.
struct Codes {
  uint4 v[kGroup >= 64 ? kGroup / 64 : 1];
  u32 scales;
};
// Makes them any values.
__device__ __forceinline__ void forget(Codes& c) {
#pragma unroll
  for (uint4& v : c.v) asm volatile("" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w));
  asm volatile("" : "=r"(c.scales));
}
// The same as wgmma wants them.
struct Fragment {
  u32 a[kSteps * 4];
  u32 scales;
};

// `group`: of the stage.
__device__ __forceinline__ void load_codes(Codes& c, u32 w, u32 s, int tile, int group) {
  w += tile * kTileBytes;
  if constexpr (kGroup >= 64) {
#pragma unroll
    for (int h = 0; h < kGroup / 64; ++h) c.v[h] = lds128(w + (group * (kGroup / 64) + h) * 2048);
  } else {
    const uint2 v = lds64(w + (group >> 1) * 2048 + (group & 1) * 8);
    c.v[0].x = v.x, c.v[0].y = v.y;
  }
  c.scales = lds32(s + tile * kTileScaleBytes + group * 128);
}
__device__ __forceinline__ void decode(Fragment& f, const Codes& c) {
  f.scales = c.scales;
#pragma unroll
  for (int h = 0; h < (kGroup + 63) / 64; ++h) {
    decode_int4<kMinusEight>(c.v[h].x, f.a[8 * h + 0], f.a[8 * h + 1]);
    decode_int4<kMinusEight>(c.v[h].y, f.a[8 * h + 2], f.a[8 * h + 3]);
    if constexpr (kGroup >= 64) {
      decode_int4<kMinusEight>(c.v[h].z, f.a[8 * h + 4], f.a[8 * h + 5]);
      decode_int4<kMinusEight>(c.v[h].w, f.a[8 * h + 6], f.a[8 * h + 7]);
    }
  }
}

// Descriptor of a panel: swizzled rows, 8 of them every 8 * kPanel bytes.
__device__ __forceinline__ u64 panel_descriptor(u32 address) {
  constexpr u64 kSwizzle = kPanel == 128 ? 1 : 2;
  return static_cast<u64>((address & 0x3ffffu) >> 4) | (1ull << 16) |
         (static_cast<u64>(8 * kPanel >> 4) << 32) | (kSwizzle << 62);
}
// How much further in a half the j-th 32 columns are, in a descriptor's units of 16 bytes.
__device__ __forceinline__ constexpr u64 column_step(int j) {
  return (j * 32 / kPanel * (kTokens * kPanel) + j * 32 % kPanel) / 16;
}

// A tile's products of a fragment and a panel, before they are scaled.
template <int kColumns>
__device__ __forceinline__ void issue(float (&part)[kColumns / 2], const Fragment& f, u64 b,
                                      int group) {
  pin(part);
  mma_fence();
#pragma unroll
  for (int j = 0; j < kSteps; ++j) {
    Mma<kColumns>::issue(part, f.a[4 * j], f.a[4 * j + 1], f.a[4 * j + 2], f.a[4 * j + 3],
                         b + column_step(group * kSteps + j), j);
  }
  mma_commit();
}
// Adds kCount of them, from kFrom on, times the scales of the fragment's rows, and of the columns if
// these have some for each stage: `columns` is where this thread's first two are.
template <int kFrom, int kCount, int kAll>
__device__ __forceinline__ void add(float (&acc)[kAll], const float (&products)[kAll], u32 scales,
                                    u32 columns) {
  const float s0 = bf16_low(scales), s1 = bf16_high(scales);
#pragma unroll
  for (int c = kFrom; c < kFrom + kCount; c += 4) {
    const float* v = products + c;
    float* to = acc + c;
    if constexpr (kRowScales) {
      const uint2 two = lds64(columns + c * 8);
      const float t0 = __uint_as_float(two.x), t1 = __uint_as_float(two.y);
      to[0] += v[0] * t0 * s0, to[1] += v[1] * t1 * s0;
      to[2] += v[2] * t0 * s1, to[3] += v[3] * t1 * s1;
    } else {
      to[0] += v[0] * s0, to[1] += v[1] * s0, to[2] += v[2] * s1, to[3] += v[3] * s1;
    }
  }
}

// Where this thread's codes of a warpgroup's first row tile are in a stage, 16 bytes, and its rows'
// scales, 4 bytes for four threads.
struct Mine {
  u32 codes, scales, lane;
  // Read here, in no register before.
  __device__ __forceinline__ static Mine here() {
    const u32 thread = read_thread(), before = thread & ~127u;  // threads of warpgroups before
    return Mine{kWeightsAt + (thread + before * (kPerWg * kTileBytes / 2048 - 1)) * 16,
                kScalesAt + (thread & ~3u) + before * (kPerWg * kTileScaleBytes / 128 - 1),
                thread & 31};
  }
};

// acc[t] = row tile t of this warpgroup times kN tokens, over all of K. One warpgroup has work for
// the matrix unit while the other scales, adds and decodes. Codes of the next scale group or row
// tile are on their way while one's products are added. To decode them while the matrix unit works,
// or to add columns in parts, costs more than it saves (docs/kernels.md). `gathered`: lanes copied
// the tokens.
template <int kN, class Way>
__device__ __forceinline__ void multiply(float (&acc)[kPerWg][kN / 2], int stages,
                                         const Ring& ring, Way& from, bool gathered) {
  // Wider tiles have no registers for it, nor have many sums whose scales change often.
  constexpr bool kKeep = kN < 184 && (kGroup == 128 || kMinusEight || kPerWg * kN < 240);
  constexpr int kParts = kPerWg * kGroups;  // of a half; a stage's have no loop
  Way place = from;
  place.slot = uniform(from.slot), place.phase = static_cast<u32>(uniform(from.phase));
  auto wait = [&](int half) {
    if constexpr (kSorted) {
      wait_listed(ring, place, gathered);
    } else {
      if (half == 0) barrier_wait(ring.weights_full(place.slot), place.parity());
      barrier_wait(ring.tokens_full(place.slot, half), place.parity());
      fence_async_proxy();  // the matrix unit reads past ordinary writes
    }
  };
#pragma unroll
  for (int t = 0; t < kPerWg; ++t) {
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) acc[t][i] = 0.0f;
  }
  wait(0);
  u32 stage = ring.stage(place.slot);
  const Mine first = Mine::here();
  Codes codes;
  load_codes(codes, stage + first.codes, stage + first.scales, 0, 0);
#pragma unroll 1
  for (int left = stages; left > 0; --left) {
#pragma unroll
    for (int part = 0; part < kHalves * kParts; ++part) {
      const int half = part / kParts, group = part % kParts / kPerWg;
      Fragment f;
      decode(f, codes);
#pragma unroll
      for (int j = 0; j < kSteps * 4; ++j) f.a[j] = kept(f.a[j]);
      float products[kN / 2];
      const u64 b = panel_descriptor(stage + half * kTokenBytes);
      issue<kN>(products, f, b, group);
      const bool last = part + 1 == kHalves * kParts;
      const u32 empty = ring.empty(place.slot), here = stage;
      if (last) {
        place.advance(ring.size);
        stage = ring.stage(place.slot);
        if (left > 1) wait(0);
      } else if ((part + 1) % kParts == 0) {
        wait(half + 1);
      }
      mma_wait<0>();
      pin(products);
      const Mine mine = kKeep ? first : Mine::here();
      if (last && !kRowScales) release_stage(empty, mine.lane);
      const u32 columns = here + kColumnScalesAt + (mine.lane & 3) * 8;
      // Half of the products are added before codes come, and take their registers.
      constexpr int kFirst = kN / 4 / 4 * 4;
      float (&sums)[kN / 2] = acc[part % kPerWg];
      add<0, kFirst>(sums, products, f.scales, columns);
      const int next = last ? 0 : part + 1, next_half = next / kParts;
      u32 w = stage + next_half * (kK * 32) + mine.codes;
      u32 s = stage + next_half * (kGroups * 128) + mine.scales;
      if (!kKeep) w = kept(w), s = kept(s);
      if (!last || left > 1) {
        load_codes(codes, w, s, next % kPerWg, next % kParts / kPerWg);
      } else {
        forget(codes);  // or the last ones would keep their registers
      }
      add<kFirst, kN / 2 - kFirst>(sums, products, f.scales, columns);
      if (last && kRowScales) release_stage(empty, mine.lane);
    }
  }
  from = place;
}

// Calls body.run<kN>() with the fewest columns that hold `count` tokens: steps of 16, above 96 of 8.
template <class Body>
__device__ __forceinline__ void with_columns(int count, Body& body) {
  const int eights = (uniform(count) + 7) / 8;
  if constexpr (kSorted) {
    switch (eights) {
      case 17: return body.template run<136>();
      case 18: return body.template run<144>();
      case 19: return body.template run<152>();
      case 20: return body.template run<160>();
      case 21: return body.template run<168>();
      case 22: return body.template run<176>();
      case 23: return body.template run<184>();
      case 24: return body.template run<192>();
    }
  }
  switch (eights) {
    case 13: return body.template run<104>();
    case 14: return body.template run<112>();
    case 15: return body.template run<120>();
    case 16: return body.template run<128>();
  }
  switch ((eights + 1) / 2) {
    case 1: return body.template run<16>();
    case 2: return body.template run<32>();
    case 3: return body.template run<48>();
    case 4: return body.template run<64>();
    case 5: return body.template run<80>();
    default: return body.template run<96>();
  }
}
