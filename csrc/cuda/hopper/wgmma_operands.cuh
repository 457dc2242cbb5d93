// What products of warpgroups need besides instructions: descriptors of tiles in shared memory, cleared sums.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace mmadapt::hopper {

// The same value in every lane, and known to the compiler as such: wgmma under a branch that might
// diverge is serialised.
template <class Number>
__device__ __forceinline__ Number uniform(Number value) {
  return __shfl_sync(0xFFFFFFFFu, value, 0);
}

// Byte offset of 16-byte unit `unit` of row `row`, where a row is `row_bytes` (128 or 64) long.
__host__ __device__ __forceinline__ constexpr uint32_t swizzled(uint32_t row, uint32_t unit,
                                                                uint32_t row_bytes) {
  return row_bytes == 128 ? row * 128 + ((unit ^ (row & 7)) << 4)
                          : row * 64 + ((unit ^ ((row >> 1) & 3)) << 4);
}

// A descriptor is 64 bits: the low word holds the address (>> 4), the high word the distance between groups
// of eight rows and the swizzle. Walking over tiles adds to the low word, so that is what callers keep.
__host__ __device__ constexpr uint32_t high_word(int row_bytes) {
  return (uint32_t(8 * row_bytes) >> 4) | ((row_bytes == 128 ? 1u : 2u) << 30);
}
// `between`: bytes from one box of a side to the next, where it is stored across K and spans several.
__device__ __forceinline__ uint32_t low_word(uint32_t address, uint32_t between = 16) {
  return ((address & 0x3FFFF) >> 4) | (between >> 4) << 16;
}

template <int N>
__device__ __forceinline__ void clear(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) d[i] = 0.0f;
}

template <class T>
inline constexpr bool is_bf16 = false;
template <>
inline constexpr bool is_bf16<__nv_bfloat16> = true;

}  // namespace mmadapt::hopper
