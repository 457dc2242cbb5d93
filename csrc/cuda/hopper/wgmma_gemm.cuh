// Products of a warpgroup (128 threads) as a GEMM's main loop needs them: D [64 x N] += A [64 x 16]
// B [16 x N], fp32 sums, A and B 16-bit numbers in shared memory; N = 16, 32, 64, 128, 192, 256.
//
// Both lie in rows of 128 bytes with the 128-byte swizzle, as TMA boxes of 64 columns write them:
//
//   A, K-major        64 rows of 64 k
//   B, K-major        N rows of 64 k: a weight [columns, K]
//   B, N-major        N / 64 boxes one after the other, each 64 rows (k) of 64 n: a weight [K, columns]
//
// Each thread holds, for every 8 columns j, row 16 warp + lane/4 at columns 8j + 2 (lane%4) + {0, 1} in
// d[4j], d[4j+1], and the same columns of the row 8 below in d[4j+2], d[4j+3].
#pragma once

#include "wgmma_common.cuh"

namespace mmadapt::hopper::gemm {

enum class Major { K, N };

// The low word of a descriptor of the first box, K-major or, boxes of 64 n being 8192 bytes apart, N-major.
template <Major MAJOR>
__device__ __forceinline__ uint32_t first_box(uint32_t address) {
  return MAJOR == Major::K ? low_word(address) : low_word(address, 8192);
}
// What 16 k further adds to a low word: 32 bytes within the rows, or 16 rows.
template <Major MAJOR>
inline constexpr uint32_t kStep = MAJOR == Major::K ? 32 >> 4 : (16 * 128) >> 4;

template <Major MAJOR>
inline constexpr int kIsNMajor = MAJOR == Major::N;

// `left`, `right`: low words. keep = 0 overwrites D. The operands after the sums are numbered.
#define MMADAPT_WGMMA(N, TYPE, A, B, HIGH, KEEP, TRANSPOSED)                                        \
  asm volatile("{\n.reg .b64 a, b;\n.reg .pred keep;\nmov.b64 a, {%" #A ", %" #HIGH "};\n"          \
               "mov.b64 b, {%" #B ", %" #HIGH "};\nsetp.ne.b32 keep, %" #KEEP ", 0;\n"              \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE                      \
               " {" MMADAPT_NAMES_##N "}, a, b, keep, 1, 1, 0, %" #TRANSPOSED ";\n}\n"              \
               : MMADAPT_SUMS_##N                                                                   \
               : "r"(left), "r"(right), "n"(high_word(128)), "r"(keep), "n"(kIsNMajor<MAJOR>))
#define MMADAPT_PRODUCT(N, A, B, HIGH, KEEP, TRANSPOSED)                                            \
  template <class T, Major MAJOR>                                                                   \
  __device__ __forceinline__ void multiply(float (&d)[N / 2], uint32_t left, uint32_t right,        \
                                           int keep) {                                              \
    if constexpr (is_bf16<T>) {                                                                     \
      MMADAPT_WGMMA(N, "bf16", A, B, HIGH, KEEP, TRANSPOSED);                                       \
    } else {                                                                                        \
      MMADAPT_WGMMA(N, "f16", A, B, HIGH, KEEP, TRANSPOSED);                                        \
    }                                                                                               \
  }
MMADAPT_PRODUCT(16, 8, 9, 10, 11, 12)
MMADAPT_PRODUCT(32, 16, 17, 18, 19, 20)
MMADAPT_PRODUCT(64, 32, 33, 34, 35, 36)
MMADAPT_PRODUCT(128, 64, 65, 66, 67, 68)
MMADAPT_PRODUCT(192, 96, 97, 98, 99, 100)
MMADAPT_PRODUCT(256, 128, 129, 130, 131, 132)
#undef MMADAPT_PRODUCT
#undef MMADAPT_WGMMA

}  // namespace mmadapt::hopper::gemm
