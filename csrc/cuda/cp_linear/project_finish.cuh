// From the sums of x factor_in^T to z and the cores: the parts of K are added up, then finished in cores.cuh,
// or here with a mode matrix.
#pragma once

#include "../hopper/barrier.cuh"
#include "cores.cuh"
#include "project_tiles.h"

namespace mmadapt::cp_linear::project {

__device__ __forceinline__ float4 load_remote4(uint32_t address) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

// Calls body(item) for the items of this thread; the blocks of a cluster have kRows / split rows each.
template <int RP, class Body>
__device__ __forceinline__ void for_items(const Arguments &a, int64_t first_row, int block, int thread,
                                          Body body) {
  constexpr int kUnits = RP / 8;
  const int owned = kRows / a.split;
  for (int i = thread; i < owned * kUnits; i += kConsumers) {
    const Item item = make_item(a.cores, first_row, block * owned + i / kUnits, i % kUnits);
    if (exists(a.cores, item)) body(item);
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

// With a mode matrix: a row of z, of which `kept` says what entered, times the matrix.
template <class T, int RP>
__device__ __forceinline__ void multiplied_core(const Cores &c, int k, const Item &item, const float *z,
                                                const uint8_t *kept) {
  constexpr int kUnits = RP / 8;
  float core[8] = {};
  const float *row = z + item.local * Layout<RP>::kStride;
  const float factor = c.dropout == MMADAPT_DROPOUT_BEFORE ? c.kept : 1.0f;
  for (int unit = 0; unit < c.rank / 8; ++unit) {
    const uint32_t bits = kept[item.local * kUnits + unit];
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      const float entry = (bits >> r & 1) ? row[8 * unit + r] * factor : 0.0f;
      float mode[8];
      load_mode<T>(mode, c.mode[k], c.wide >> k & 1, (8 * unit + r) * c.rank + 8 * item.unit);
#pragma unroll
      for (int e = 0; e < 8; ++e) core[e] = fmaf(entry, mode[e], core[e]);
    }
  }
  uint32_t after = 0xFF;
  if (c.dropout == MMADAPT_DROPOUT_AFTER) after = keep_bits(c.seeds[k], item.at, c.threshold);
  const float scale = c.dropout == MMADAPT_DROPOUT_AFTER ? c.kept : 1.0f;
#pragma unroll
  for (int e = 0; e < 8; ++e) core[e] = (after >> e & 1) ? core[e] * scale * c.scale : 0.0f;
  store_row<T>(c.core, int64_t(k) * c.tokens * c.rank + item.at, core);
}

// All consumer threads of a block, when the sums of the whole cluster lie in shared memory (`memory`, `sums`
// as an address). A thread reads of its own block's sums only what it overwrites with z.
template <class T, int RP>
__device__ __forceinline__ void finish(const Arguments &a, uint8_t *memory, uint32_t sums,
                                       int64_t first_row, int block, int thread) {
  using L = Layout<RP>;
  const Cores &c = a.cores;
  float *const whole = reinterpret_cast<float *>(memory);
  uint8_t *const kept = memory + L::kKept;
  for_items<RP>(a, first_row, block, thread, [&](const Item &item) {
    float z[8];
    add_parts<RP>(z, a, sums, item);
    store_row<T>(c.z, item.at, z);
    for (int k = 0; k < c.count; ++k) {
      if (!(a.dense >> k & 1)) scaled_core<T>(c, k, item, z);
    }
    if (a.dense != 0) {
      float *to = whole + item.local * L::kStride + 8 * item.unit;
#pragma unroll
      for (int e = 0; e < 8; ++e) to[e] = z[e];
    }
  });
  for (int k = 0; k < c.count; ++k) {
    if (!(a.dense >> k & 1)) continue;
    for_items<RP>(a, first_row, block, thread, [&](const Item &item) {
      const bool drops = c.dropout == MMADAPT_DROPOUT_BEFORE;
      kept[item.local * (RP / 8) + item.unit] =
          drops ? keep_bits(c.seeds[k], item.at, c.threshold) : 0xFF;
    });
    hopper::named_barrier(1, kConsumers);
    for_items<RP>(a, first_row, block, thread,
                  [&](const Item &item) { multiplied_core<T, RP>(c, k, item, whole, kept); });
    hopper::named_barrier(1, kConsumers);
  }
}

}  // namespace mmadapt::cp_linear::project
