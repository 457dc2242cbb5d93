// Products of a warpgroup (128 threads): D [64 x N] += A [64 x 16] B [16 x N], fp32 sums.
//
// A comes from registers or, with K contiguous, from shared memory; B from shared memory, with K or with N
// contiguous. Matrices in shared memory are tiles of 16-bit numbers whose rows are 128 or 64 bytes long,
// swizzled, and are named by descriptors.
//
// Each thread of D holds, for every 8 columns j, row 16 warp + lane/4 at columns 8j + 2 (lane%4) + {0, 1} in
// d[4j], d[4j+1], and the same columns of the row 8 below in d[4j+2], d[4j+3]. A in registers: the same with
// j = 0, 1 and pairs as one register, a[2j] the row and a[2j+1] the row 8 below.
#pragma once

#include "wgmma_common.cuh"

namespace mmadapt::hopper {

// A, B: low and high word of the descriptors; TRANSPOSED: N is contiguous in B.
#define MMADAPT_SHARED(N, TYPE, A0, A1, B0, B1, TR)                                                 \
  asm volatile("{\n.reg .b64 a, b;\nmov.b64 a, {" A0 ", " A1 "};\nmov.b64 b, {" B0 ", " B1 "};\n"   \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" MMADAPT_NAMES_##N \
               "}, a, b, 1, 1, 1, 0, " TR ";\n}\n"                                                  \
               : MMADAPT_SUMS_##N                                                                   \
               : "r"(a), "n"(high_word(128)), "r"(b), "n"(high_word(ROW_BYTES)), "n"(TRANSPOSED))
#define MMADAPT_REGISTERS(N, TYPE, A0, A1, A2, A3, B0, B1, TR)                                      \
  asm volatile("{\n.reg .b64 b;\nmov.b64 b, {" B0 ", " B1 "};\n"                                    \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" MMADAPT_NAMES_##N \
               "}, {" A0 ", " A1 ", " A2 ", " A3 "}, b, 1, 1, 1, " TR ";\n}\n"                      \
               : MMADAPT_SUMS_##N                                                                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(high_word(ROW_BYTES)),     \
                 "n"(TRANSPOSED))

// `a`, `b`: low words. ROW_BYTES: of B's rows; A's are 128 bytes long.
template <class T, int N, int ROW_BYTES, int TRANSPOSED>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], uint32_t a, uint32_t b) {
  static_assert(N == 32 || N == 64 || N == 128);
  if constexpr (N == 32 && is_bf16<T>) {
    MMADAPT_SHARED(32, "bf16", "%16", "%17", "%18", "%19", "%20");
  } else if constexpr (N == 32) {
    MMADAPT_SHARED(32, "f16", "%16", "%17", "%18", "%19", "%20");
  } else if constexpr (N == 64 && is_bf16<T>) {
    MMADAPT_SHARED(64, "bf16", "%32", "%33", "%34", "%35", "%36");
  } else if constexpr (N == 64) {
    MMADAPT_SHARED(64, "f16", "%32", "%33", "%34", "%35", "%36");
  } else if constexpr (is_bf16<T>) {
    MMADAPT_SHARED(128, "bf16", "%64", "%65", "%66", "%67", "%68");
  } else {
    MMADAPT_SHARED(128, "f16", "%64", "%65", "%66", "%67", "%68");
  }
}

template <class T, int N, int ROW_BYTES, int TRANSPOSED>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint32_t b) {
  static_assert(N == 32 || N == 64 || N == 128);
  if constexpr (N == 32 && is_bf16<T>) {
    MMADAPT_REGISTERS(32, "bf16", "%16", "%17", "%18", "%19", "%20", "%21", "%22");
  } else if constexpr (N == 32) {
    MMADAPT_REGISTERS(32, "f16", "%16", "%17", "%18", "%19", "%20", "%21", "%22");
  } else if constexpr (N == 128 && is_bf16<T>) {
    MMADAPT_REGISTERS(128, "bf16", "%64", "%65", "%66", "%67", "%68", "%69", "%70");
  } else if constexpr (N == 128) {
    MMADAPT_REGISTERS(128, "f16", "%64", "%65", "%66", "%67", "%68", "%69", "%70");
  } else if constexpr (is_bf16<T>) {
    MMADAPT_REGISTERS(64, "bf16", "%32", "%33", "%34", "%35", "%36", "%37", "%38");
  } else {
    MMADAPT_REGISTERS(64, "f16", "%32", "%33", "%34", "%35", "%36", "%37", "%38");
  }
}
#undef MMADAPT_SHARED
#undef MMADAPT_REGISTERS

}  // namespace mmadapt::hopper
