// z and the cores of mode vectors from sums, eight ranks of a row at a time: the mode and the dropout mask are
// applied in fp32 and each result is rounded once.
#pragma once

#include "../hopper/fragment.cuh"
#include "cores.h"

namespace mmadapt::cp_linear {

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
__device__ __forceinline__ Item make_item(const Cores &c, int64_t first_row, int local, int unit) {
  const int64_t row = first_row + local;
  return {local, unit, row, row * c.rank + 8 * unit};
}
// Of a tile that reaches past the last row or the last rank, some are outside.
__device__ __forceinline__ bool exists(const Cores &c, const Item &item) {
  return 8 * item.unit < c.rank && item.row < c.tokens;
}

// The core of one weight with a mode vector.
template <class T>
__device__ __forceinline__ void scaled_core(const Cores &c, int k, const Item &item, const float (&z)[8]) {
  float mode[8], core[8];
  load_mode<T>(mode, c.mode[k], c.wide >> k & 1, 8 * item.unit);
  uint32_t kept = 0xFF;
  if (c.dropout != MMADAPT_DROPOUT_NONE) kept = keep_bits(c.seeds[k], item.at, c.threshold);
  const float factor = c.dropout == MMADAPT_DROPOUT_NONE ? 1.0f : c.kept;
#pragma unroll
  for (int e = 0; e < 8; ++e) core[e] = (kept >> e & 1) ? z[e] * factor * mode[e] * c.scale : 0.0f;
  store_row<T>(c.core, int64_t(k) * c.tokens * c.rank + item.at, core);
}

}  // namespace mmadapt::cp_linear
