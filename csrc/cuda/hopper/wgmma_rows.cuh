// Products of a warpgroup (128 threads) that sum over rows: D [64 x N] += A^T B, fp32 sums.
//
// A [16 x 64] and B [16 x N] are 16 rows of tiles of 16-bit numbers in shared memory, as TMA leaves them:
// boxes side by side, a row of a box 128 or 64 bytes long and stored with the swizzle of that width. To
// wgmma they are "MN-major". In the terms of a descriptor: within a box, groups of eight rows are the
// stride byte offset apart; boxes the leading byte offset (PTX ISA, strides of wgmma's matrices).
//
// Threads hold D as in wgmma.cuh; what is a row there is a column of A here.
#pragma once

#include "wgmma_common.cuh"

namespace mmadapt::hopper {

#define MMADAPT_WGMMA_ROWS(TYPE, N, LEFT, RIGHT, LEFT_HIGH, RIGHT_HIGH)                             \
  asm volatile("{\n.reg .b64 a, b;\n"                                                               \
               "mov.b64 a, {" LEFT ", " LEFT_HIGH "};\nmov.b64 b, {" RIGHT ", " RIGHT_HIGH "};\n"   \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE                      \
               " {" MMADAPT_NAMES_##N "}, a, b, 1, 1, 1, 1, 1;\n}\n"                                \
               : MMADAPT_SUMS_##N                                                                   \
               : "r"(left), "r"(right), "n"(high_word(128)), "n"(high_word(ROW_BYTES)))

// `left`, `right`: low words (low_word). Rows of A are 128 bytes long, those of B ROW_BYTES.
template <class T, int N, int ROW_BYTES>
__device__ __forceinline__ void wgmma_rows(float (&d)[N / 2], uint32_t left, uint32_t right) {
  static_assert(N == 32 || N == 64 || N == 128, "no such product here");
  if constexpr (N == 32 && is_bf16<T>) {
    MMADAPT_WGMMA_ROWS("bf16", 32, "%16", "%17", "%18", "%19");
  } else if constexpr (N == 32) {
    MMADAPT_WGMMA_ROWS("f16", 32, "%16", "%17", "%18", "%19");
  } else if constexpr (N == 64 && is_bf16<T>) {
    MMADAPT_WGMMA_ROWS("bf16", 64, "%32", "%33", "%34", "%35");
  } else if constexpr (N == 64) {
    MMADAPT_WGMMA_ROWS("f16", 64, "%32", "%33", "%34", "%35");
  } else if constexpr (N == 128 && is_bf16<T>) {
    MMADAPT_WGMMA_ROWS("bf16", 128, "%64", "%65", "%66", "%67");
  } else if constexpr (N == 128) {
    MMADAPT_WGMMA_ROWS("f16", 128, "%64", "%65", "%66", "%67");
  }
}
#undef MMADAPT_WGMMA_ROWS

}  // namespace mmadapt::hopper
