// From the sums of x factor_in^T to z and the cores: the parts of K are added up, then the mode and the
// dropout mask applied in fp32 and each result rounded once.
#pragma once

#include "../hopper/barrier.cuh"
#include "../hopper/fragment.cuh"
#include "project_tiles.h"

namespace mmadapt::cp_linear::project {

// Whether the entry survives: keep_mask of the formula, bit for bit.
__device__ __forceinline__ bool keeps(int64_t seed, int64_t index, int threshold) {
  uint64_t bits = uint64_t(index) * 0x9E3779B97F4A7C15ull + uint64_t(seed);
  bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9ull;
  bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBull;
  return int(bits >> 40) >= threshold;
}

__device__ __forceinline__ uint32_t keep_bits(int64_t seed, int64_t first, int threshold) {
  uint32_t bits = 0;
#pragma unroll
  for (int e = 0; e < 8; ++e) bits |= uint32_t(keeps(seed, first + e, threshold)) << e;
  return bits;
}

__device__ __forceinline__ float4 load_remote4(uint32_t address) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

// Eight entries of a mode from `at` on.
template <class T>
__device__ __forceinline__ void load_mode(float (&to)[8], const void *mode, bool wide, int at) {
  if (wide) {
    const float *from = static_cast<const float *>(mode) + at;
#pragma unroll
    for (int e = 0; e < 8; ++e) to[e] = __ldg(from + e);
  } else {
    const T *from = static_cast<const T *>(mode) + at;
#pragma unroll
    for (int e = 0; e < 8; ++e) to[e] = hopper::widen(from[e]);
  }
}

template <class T>
__device__ __forceinline__ void store_row(void *to, int64_t at, const float (&v)[8]) {
  const uint4 words = {hopper::pack<T>(v[0], v[1]), hopper::pack<T>(v[2], v[3]),
                       hopper::pack<T>(v[4], v[5]), hopper::pack<T>(v[6], v[7])};
  *reinterpret_cast<uint4 *>(static_cast<T *>(to) + at) = words;
}

// Eight ranks of one row, which one thread finishes.
struct Item {
  int local;    // row among those of the tile
  int unit;     // ranks 8 unit ..
  int64_t row;  // of x
  int64_t at;   // row * rank + 8 unit: of z, and of the hash
};

// Calls body(item) for the items of this thread; the blocks of a cluster have kRows / split rows each.
template <int RP, class Body>
__device__ __forceinline__ void for_items(const Arguments &a, int64_t first_row, int block, int thread,
                                          Body body) {
  constexpr int kUnits = RP / 8;
  const int owned = kRows / a.split;
  for (int i = thread; i < owned * kUnits; i += kConsumers) {
    Item item;
    item.local = block * owned + i / kUnits;
    item.unit = i % kUnits;
    item.row = first_row + item.local;
    item.at = item.row * a.rank + 8 * item.unit;
    if (8 * item.unit < a.rank && item.row < a.tokens) body(item);
  }
}

// z of an item: the sums of all parts, in the order of the parts.
template <int RP>
__device__ __forceinline__ void add_parts(float (&z)[8], const Arguments &a, uint32_t sums,
                                          const Item &item) {
  const uint32_t at = sums + (item.local * Layout<RP>::kStride + 8 * item.unit) * 4;
#pragma unroll
  for (int e = 0; e < 8; ++e) z[e] = 0.0f;
  for (int part = 0; part < a.split; ++part) {
    const uint32_t from = hopper::remote(at, part);
    const float4 low = load_remote4(from), high = load_remote4(from + 16);
    z[0] += low.x, z[1] += low.y, z[2] += low.z, z[3] += low.w;
    z[4] += high.x, z[5] += high.y, z[6] += high.z, z[7] += high.w;
  }
}

// The core of one weight with a mode vector.
template <class T>
__device__ __forceinline__ void scaled_core(const Arguments &a, int k, const Item &item,
                                            const float (&z)[8]) {
  float mode[8], core[8];
  load_mode<T>(mode, a.mode[k], a.wide >> k & 1, 8 * item.unit);
  uint32_t kept = 0xFF;
  if (a.dropout != MMADAPT_DROPOUT_NONE) kept = keep_bits(a.seeds[k], item.at, a.threshold);
  const float factor = a.dropout == MMADAPT_DROPOUT_NONE ? 1.0f : a.kept;
#pragma unroll
  for (int e = 0; e < 8; ++e) core[e] = (kept >> e & 1) ? z[e] * factor * mode[e] * a.scale : 0.0f;
  store_row<T>(a.core, int64_t(k) * a.tokens * a.rank + item.at, core);
}

// With a mode matrix: a row of z, of which `kept` says what entered, times the matrix.
template <class T, int RP>
__device__ __forceinline__ void multiplied_core(const Arguments &a, int k, const Item &item,
                                                const float *z, const uint8_t *kept) {
  constexpr int kUnits = RP / 8;
  float core[8] = {};
  const float *row = z + item.local * Layout<RP>::kStride;
  const float factor = a.dropout == MMADAPT_DROPOUT_BEFORE ? a.kept : 1.0f;
  for (int unit = 0; unit < a.rank / 8; ++unit) {
    const uint32_t bits = kept[item.local * kUnits + unit];
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      const float entry = (bits >> r & 1) ? row[8 * unit + r] * factor : 0.0f;
      float mode[8];
      load_mode<T>(mode, a.mode[k], a.wide >> k & 1, (8 * unit + r) * a.rank + 8 * item.unit);
#pragma unroll
      for (int e = 0; e < 8; ++e) core[e] = fmaf(entry, mode[e], core[e]);
    }
  }
  uint32_t after = 0xFF;
  if (a.dropout == MMADAPT_DROPOUT_AFTER) after = keep_bits(a.seeds[k], item.at, a.threshold);
  const float scale = a.dropout == MMADAPT_DROPOUT_AFTER ? a.kept : 1.0f;
#pragma unroll
  for (int e = 0; e < 8; ++e) core[e] = (after >> e & 1) ? core[e] * scale * a.scale : 0.0f;
  store_row<T>(a.core, int64_t(k) * a.tokens * a.rank + item.at, core);
}

// All consumer threads of a block, when the sums of the whole cluster lie in shared memory (`memory`, `sums`
// as an address). A thread reads of its own block's sums only what it overwrites with z.
template <class T, int RP>
__device__ __forceinline__ void finish(const Arguments &a, uint8_t *memory, uint32_t sums,
                                       int64_t first_row, int block, int thread) {
  using L = Layout<RP>;
  float *const whole = reinterpret_cast<float *>(memory);
  uint8_t *const kept = memory + L::kKept;
  for_items<RP>(a, first_row, block, thread, [&](const Item &item) {
    float z[8];
    add_parts<RP>(z, a, sums, item);
    store_row<T>(a.z, item.at, z);
    for (int k = 0; k < a.count; ++k) {
      if (!(a.dense >> k & 1)) scaled_core<T>(a, k, item, z);
    }
    if (a.dense != 0) {
      float *to = whole + item.local * L::kStride + 8 * item.unit;
#pragma unroll
      for (int e = 0; e < 8; ++e) to[e] = z[e];
    }
  });
  for (int k = 0; k < a.count; ++k) {
    if (!(a.dense >> k & 1)) continue;
    for_items<RP>(a, first_row, block, thread, [&](const Item &item) {
      const bool drops = a.dropout == MMADAPT_DROPOUT_BEFORE;
      kept[item.local * (RP / 8) + item.unit] =
          drops ? keep_bits(a.seeds[k], item.at, a.threshold) : 0xFF;
    });
    hopper::named_barrier(1, kConsumers);
    for_items<RP>(a, first_row, block, thread,
                  [&](const Item &item) { multiplied_core<T, RP>(a, k, item, whole, kept); });
    hopper::named_barrier(1, kConsumers);
  }
}

}  // namespace mmadapt::cp_linear::project
