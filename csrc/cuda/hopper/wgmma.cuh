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

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace mmadapt::hopper {

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
__device__ __forceinline__ uint32_t low_word(uint32_t address) {
  return ((address & 0x3FFFF) >> 4) | (1u << 16);
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

template <int N>
__device__ __forceinline__ void clear(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) d[i] = 0.0f;
}

// Keeps the compiler from moving uses of the sums across a wait.
template <int N>
__device__ __forceinline__ void wgmma_pin(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

template <class T>
inline constexpr bool is_bf16 = false;
template <>
inline constexpr bool is_bf16<__nv_bfloat16> = true;

// Operands of the instructions: D by eight, as text and as constraints.
#define MMADAPT_TEXT8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define MMADAPT_TEXT16 MMADAPT_TEXT8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define MMADAPT_TEXT32 MMADAPT_TEXT16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define MMADAPT_TEXT64                                                                               \
  MMADAPT_TEXT32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51"  \
                 ",%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define MMADAPT_OUT8(d, i)                                                                           \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]),        \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define MMADAPT_OUT16(d) MMADAPT_OUT8(d, 0), MMADAPT_OUT8(d, 8)
#define MMADAPT_OUT32(d) MMADAPT_OUT16(d), MMADAPT_OUT8(d, 16), MMADAPT_OUT8(d, 24)
#define MMADAPT_OUT64(d)                                                                             \
  MMADAPT_OUT32(d), MMADAPT_OUT8(d, 32), MMADAPT_OUT8(d, 40), MMADAPT_OUT8(d, 48), MMADAPT_OUT8(d, 56)

// A, B: low and high word of the descriptors; TRANSPOSED: N is contiguous in B.
#define MMADAPT_SHARED(N, TYPE, TEXT, OUT, A0, A1, B0, B1, TR)                                       \
  asm volatile("{\n.reg .b64 a, b;\nmov.b64 a, {" A0 ", " A1 "};\nmov.b64 b, {" B0 ", " B1 "};\n"   \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" TEXT            \
               "}, a, b, 1, 1, 1, 0, " TR ";\n}\n"                                                  \
               : OUT                                                                                \
               : "r"(a), "n"(high_word(128)), "r"(b), "n"(high_word(ROW_BYTES)), "n"(TRANSPOSED))
#define MMADAPT_REGISTERS(N, TYPE, TEXT, OUT, A0, A1, A2, A3, B0, B1, TR)                            \
  asm volatile("{\n.reg .b64 b;\nmov.b64 b, {" B0 ", " B1 "};\n"                                    \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" TEXT            \
               "}, {" A0 ", " A1 ", " A2 ", " A3 "}, b, 1, 1, 1, " TR ";\n}\n"                      \
               : OUT                                                                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(high_word(ROW_BYTES)),     \
                 "n"(TRANSPOSED))

// `a`, `b`: low words. ROW_BYTES: of B's rows; A's are 128 bytes long.
template <class T, int N, int ROW_BYTES, int TRANSPOSED>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], uint32_t a, uint32_t b) {
  static_assert(N == 32 || N == 64 || N == 128);
  if constexpr (N == 32 && is_bf16<T>) {
    MMADAPT_SHARED(32, "bf16", MMADAPT_TEXT16, MMADAPT_OUT16(d), "%16", "%17", "%18", "%19", "%20");
  } else if constexpr (N == 32) {
    MMADAPT_SHARED(32, "f16", MMADAPT_TEXT16, MMADAPT_OUT16(d), "%16", "%17", "%18", "%19", "%20");
  } else if constexpr (N == 64 && is_bf16<T>) {
    MMADAPT_SHARED(64, "bf16", MMADAPT_TEXT32, MMADAPT_OUT32(d), "%32", "%33", "%34", "%35", "%36");
  } else if constexpr (N == 64) {
    MMADAPT_SHARED(64, "f16", MMADAPT_TEXT32, MMADAPT_OUT32(d), "%32", "%33", "%34", "%35", "%36");
  } else if constexpr (is_bf16<T>) {
    MMADAPT_SHARED(128, "bf16", MMADAPT_TEXT64, MMADAPT_OUT64(d), "%64", "%65", "%66", "%67", "%68");
  } else {
    MMADAPT_SHARED(128, "f16", MMADAPT_TEXT64, MMADAPT_OUT64(d), "%64", "%65", "%66", "%67", "%68");
  }
}

template <class T, int N, int ROW_BYTES, int TRANSPOSED>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint32_t b) {
  static_assert(N == 16 || N == 32 || N == 64 || N == 128);
  if constexpr (N == 16 && is_bf16<T>) {
    MMADAPT_REGISTERS(16, "bf16", MMADAPT_TEXT8, MMADAPT_OUT8(d, 0), "%8", "%9", "%10", "%11", "%12",
                      "%13", "%14");
  } else if constexpr (N == 16) {
    MMADAPT_REGISTERS(16, "f16", MMADAPT_TEXT8, MMADAPT_OUT8(d, 0), "%8", "%9", "%10", "%11", "%12",
                      "%13", "%14");
  } else if constexpr (N == 32 && is_bf16<T>) {
    MMADAPT_REGISTERS(32, "bf16", MMADAPT_TEXT16, MMADAPT_OUT16(d), "%16", "%17", "%18", "%19", "%20",
                      "%21", "%22");
  } else if constexpr (N == 32) {
    MMADAPT_REGISTERS(32, "f16", MMADAPT_TEXT16, MMADAPT_OUT16(d), "%16", "%17", "%18", "%19", "%20",
                      "%21", "%22");
  } else if constexpr (N == 128 && is_bf16<T>) {
    MMADAPT_REGISTERS(128, "bf16", MMADAPT_TEXT64, MMADAPT_OUT64(d), "%64", "%65", "%66", "%67", "%68",
                      "%69", "%70");
  } else if constexpr (N == 128) {
    MMADAPT_REGISTERS(128, "f16", MMADAPT_TEXT64, MMADAPT_OUT64(d), "%64", "%65", "%66", "%67", "%68",
                      "%69", "%70");
  } else if constexpr (is_bf16<T>) {
    MMADAPT_REGISTERS(64, "bf16", MMADAPT_TEXT32, MMADAPT_OUT32(d), "%32", "%33", "%34", "%35", "%36",
                      "%37", "%38");
  } else {
    MMADAPT_REGISTERS(64, "f16", MMADAPT_TEXT32, MMADAPT_OUT32(d), "%32", "%33", "%34", "%35", "%36",
                      "%37", "%38");
  }
}
#undef MMADAPT_TEXT8
#undef MMADAPT_TEXT16
#undef MMADAPT_TEXT32
#undef MMADAPT_OUT8
#undef MMADAPT_OUT16
#undef MMADAPT_OUT32
#undef MMADAPT_TEXT64
#undef MMADAPT_OUT64
#undef MMADAPT_SHARED
#undef MMADAPT_REGISTERS

}  // namespace mmadapt::hopper
