// Tensor-core products of 16-bit types, m16n8k16 with fp32 sums, operands in registers.
//
// Lane (group g, quad q) = (lane / 4, lane % 4) holds of A rows g and g + 8, of B column g, of both
// k = 2q, 2q + 1, 2q + 8, 2q + 9; of C rows g and g + 8 in columns 2q and 2q + 1.
#pragma once

#include <type_traits>

#include "vec.cuh"

namespace mmadapt {

__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                    __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                    __half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Eight numbers from k on as four registers of two, rounded to T; zeros unless `inside`.
template <class T, class W>
__device__ __forceinline__ void load_eight(uint32_t (&to)[4], const W *from, bool inside) {
  Vec<T, 8> eight;
  if (!inside) {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = 0;
    return;
  }
  if constexpr (std::is_same_v<T, W>) {
    eight = load<T, 8>(from);
  } else {
    const Vec<W, 8> wide = load<W, 8>(from);
#pragma unroll
    for (int e = 0; e < 8; ++e) eight.at[e] = from_float<T>(to_float(wide.at[e]));
  }
  const uint4 words = *reinterpret_cast<const uint4 *>(&eight);
  to[0] = words.x, to[1] = words.y, to[2] = words.z, to[3] = words.w;
}

// Two numbers of T in a register, the first in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pack(float first, float second) {
  Vec<T, 2> pair;
  pair.at[0] = from_float<T>(first);
  pair.at[1] = from_float<T>(second);
  return *reinterpret_cast<const uint32_t *>(&pair);
}

// The operand A for columns 2j and 2j + 1 out of those that this lane holds of rows k: they become
// rows g and g + 8 of A. `k`: this lane's four rows, each `words` pairs of numbers.
template <int words>
__device__ __forceinline__ void transposed(uint32_t (&a)[4], const uint32_t (&k)[4][words], int j) {
  a[0] = __byte_perm(k[0][j], k[1][j], 0x5410);  // lower halves
  a[1] = __byte_perm(k[0][j], k[1][j], 0x7632);  // upper halves
  a[2] = __byte_perm(k[2][j], k[3][j], 0x5410);
  a[3] = __byte_perm(k[2][j], k[3][j], 0x7632);
}

// k of this lane's i-th row of a block of sixteen.
__device__ __forceinline__ int lane_k(int quad, int i) { return 2 * quad + i % 2 + 8 * (i / 2); }

}  // namespace mmadapt
