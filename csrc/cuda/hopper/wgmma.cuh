// Products of a warpgroup (128 threads): D [64 x 32] += A [64 x 16] B [16 x 32], fp32 sums.
//
// A and B are K-major tiles of 16-bit numbers in shared memory, named by descriptors. Each thread of D
// holds, for every 8 columns j, row 16 warp + lane/4 at columns 8j + 2 (lane%4) + {0, 1} in d[4j], d[4j+1],
// and the same columns of the row 8 below in d[4j+2], d[4j+3].
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

// Rows of a tile are 128 or 64 bytes along K, stored with the swizzle of that width.
enum class Layout { K128, K64 };

// A descriptor is 64 bits: the low word holds the address (>> 4), the high word the distance between groups
// of eight rows and the swizzle. Walking over tiles adds to the low word, so that is what callers keep.
__host__ __device__ constexpr uint32_t high_word(Layout layout) {
  return layout == Layout::K64 ? (512 >> 4) | (2u << 30) : (1024 >> 4) | (1u << 30);
}
__device__ __forceinline__ uint32_t k_major(uint32_t address) {
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

#define MMADAPT_WGMMA(TYPE)                                                                         \
  asm volatile("{\n.reg .b64 a, b;\nmov.b64 a, {%16, %18};\nmov.b64 b, {%17, %19};\n"               \
               "wgmma.mma_async.sync.aligned.m64n32k16.f32." TYPE "." TYPE                          \
               " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15},"           \
               " a, b, %20, 1, 1, 0, 0;\n}\n"                                                      \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]),            \
                 "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]),          \
                 "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])                                 \
               : "r"(left), "r"(right), "n"(high_word(LEFT)), "n"(high_word(RIGHT)), "n"(KEEP))

// `left`, `right`: low words (k_major). KEEP = 0 overwrites D.
template <class T, Layout LEFT, Layout RIGHT, int KEEP>
__device__ __forceinline__ void wgmma(float (&d)[16], uint32_t left, uint32_t right) {
  if constexpr (is_bf16<T>) {
    MMADAPT_WGMMA("bf16");
  } else {
    MMADAPT_WGMMA("f16");
  }
}
#undef MMADAPT_WGMMA

}  // namespace mmadapt::hopper
