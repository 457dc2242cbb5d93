// Products of a warpgroup (128 threads) that sum over rows: D [64 x N] += A^T B, fp32 sums.
//
// A [16 x 64] and B [16 x N] are 16 rows of tiles of 16-bit numbers in shared memory, as TMA leaves them:
// boxes side by side, a row of a box 128 or 64 bytes long and stored with the swizzle of that width. To
// wgmma they are "MN-major". In the terms of a descriptor: within a box, groups of eight rows are the
// stride byte offset apart; boxes the leading byte offset (PTX ISA, strides of wgmma's matrices).
//
// Threads hold D as in wgmma.cuh; what is a row there is a column of A here.
#pragma once

#include "wgmma.cuh"

namespace mmadapt::hopper {

// The low word of a descriptor; adding bytes >> 4 to it walks along.
__device__ __forceinline__ uint32_t row_major(uint32_t address, uint32_t bytes_between_boxes) {
  return ((address & 0x3FFFF) >> 4) | (bytes_between_boxes >> 4) << 16;
}

// The high word: eight rows, and the swizzle.
__host__ __device__ constexpr uint32_t row_major_high(int row_bytes) {
  return row_bytes == 128 ? (1024 >> 4) | (1u << 30) : (512 >> 4) | (2u << 30);
}

#define MMADAPT_D8(i)                                                                                \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]),        \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define MMADAPT_D32(i) MMADAPT_D8(i), MMADAPT_D8(i + 8), MMADAPT_D8(i + 16), MMADAPT_D8(i + 24)
#define MMADAPT_SUMS_32 MMADAPT_D8(0), MMADAPT_D8(8)
#define MMADAPT_SUMS_64 MMADAPT_D32(0)
#define MMADAPT_SUMS_128 MMADAPT_D32(0), MMADAPT_D32(32)
#define MMADAPT_NAMES_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define MMADAPT_NAMES_64                                                                             \
  MMADAPT_NAMES_32                                                                                   \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MMADAPT_NAMES_128                                                                            \
  MMADAPT_NAMES_64                                                                                   \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"                 \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define MMADAPT_WGMMA_ROWS(TYPE, N, LEFT, RIGHT, LEFT_HIGH, RIGHT_HIGH)                              \
  asm volatile("{\n.reg .b64 a, b;\n"                                                                \
               "mov.b64 a, {" LEFT ", " LEFT_HIGH "};\nmov.b64 b, {" RIGHT ", " RIGHT_HIGH "};\n"    \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE                       \
               " {" MMADAPT_NAMES_##N "}, a, b, 1, 1, 1, 1, 1;\n}\n"                                 \
               : MMADAPT_SUMS_##N                                                                    \
               : "r"(left), "r"(right), "n"(row_major_high(128)), "n"(row_major_high(ROW_BYTES)))

// `left`, `right`: low words (row_major). Rows of A are 128 bytes long, those of B ROW_BYTES.
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
#undef MMADAPT_D8
#undef MMADAPT_D32
#undef MMADAPT_SUMS_32
#undef MMADAPT_SUMS_64
#undef MMADAPT_SUMS_128
#undef MMADAPT_NAMES_32
#undef MMADAPT_NAMES_64
#undef MMADAPT_NAMES_128

}  // namespace mmadapt::hopper
