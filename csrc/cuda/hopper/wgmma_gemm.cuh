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

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace mmadapt::hopper::gemm {

enum class Major { K, N };

// The low words of descriptors: address and, N-major, the distance (8192 bytes) between boxes of 64 n;
// both counted in 16 bytes. The high word, the same for all: eight rows are 1024 bytes, 128-byte swizzle.
constexpr uint32_t kHigh = (1024 >> 4) | (1u << 30);
__device__ __forceinline__ uint32_t k_major(uint32_t address) {
  return ((address & 0x3FFFF) >> 4) | (1u << 16);
}
__device__ __forceinline__ uint32_t n_major(uint32_t address) {
  return ((address & 0x3FFFF) >> 4) | ((8192u >> 4) << 16);
}
// What 16 k further adds to a low word: 32 bytes within the rows, or 16 rows.
template <Major MAJOR>
inline constexpr uint32_t kStep = MAJOR == Major::K ? 32 >> 4 : (16 * 128) >> 4;

template <Major MAJOR>
inline constexpr int kIsNMajor = MAJOR == Major::N;

__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until all but the newest N groups are done.
template <int N>
__device__ __forceinline__ void wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Keeps the compiler from moving uses of the sums across a wait.
template <int N>
__device__ __forceinline__ void pin(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define MMADAPT_LIST16 \
  "%0, %1, %2, %3, %4, %5, %6, %7"
#define MMADAPT_LIST32 \
  MMADAPT_LIST16 \
  ", %8, %9, %10, %11, %12, %13, %14, %15"
#define MMADAPT_LIST64 \
  MMADAPT_LIST32 \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MMADAPT_LIST128 \
  MMADAPT_LIST64 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MMADAPT_LIST192 \
  MMADAPT_LIST128 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define MMADAPT_LIST256 \
  MMADAPT_LIST192 \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define MMADAPT_D8(i)                                                                             \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]),     \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define MMADAPT_D16(i) MMADAPT_D8(i), MMADAPT_D8(i + 8)
#define MMADAPT_D32(i) MMADAPT_D16(i), MMADAPT_D16(i + 16)
#define MMADAPT_D64(i) MMADAPT_D32(i), MMADAPT_D32(i + 32)
#define MMADAPT_SUMS16 MMADAPT_D8(0)
#define MMADAPT_SUMS32 MMADAPT_D16(0)
#define MMADAPT_SUMS64 MMADAPT_D32(0)
#define MMADAPT_SUMS128 MMADAPT_D64(0)
#define MMADAPT_SUMS192 MMADAPT_D64(0), MMADAPT_D32(64)
#define MMADAPT_SUMS256 MMADAPT_D64(0), MMADAPT_D64(64)

// `left`, `right`: low words. keep = 0 overwrites D. The operands after the sums are numbered.
#define MMADAPT_WGMMA(N, TYPE, A, B, HIGH, KEEP, TRANSPOSED)                                      \
  asm volatile("{\n.reg .b64 a, b;\n.reg .pred keep;\nmov.b64 a, {%" #A ", %" #HIGH "};\n"        \
               "mov.b64 b, {%" #B ", %" #HIGH "};\nsetp.ne.b32 keep, %" #KEEP ", 0;\n"            \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE                    \
               " {" MMADAPT_LIST##N "}, a, b, keep, 1, 1, 0, %" #TRANSPOSED ";\n}\n"              \
               : MMADAPT_SUMS##N                                                                  \
               : "r"(left), "r"(right), "n"(kHigh), "r"(keep), "n"(kIsNMajor<MAJOR>))
#define MMADAPT_PRODUCT(N, A, B, HIGH, KEEP, TRANSPOSED)                                          \
  template <class T, Major MAJOR>                                                                 \
  __device__ __forceinline__ void multiply(float (&d)[N / 2], uint32_t left, uint32_t right,      \
                                           int keep) {                                            \
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {                                             \
      MMADAPT_WGMMA(N, "bf16", A, B, HIGH, KEEP, TRANSPOSED);                                     \
    } else {                                                                                      \
      MMADAPT_WGMMA(N, "f16", A, B, HIGH, KEEP, TRANSPOSED);                                      \
    }                                                                                             \
  }
MMADAPT_PRODUCT(16, 8, 9, 10, 11, 12)
MMADAPT_PRODUCT(32, 16, 17, 18, 19, 20)
MMADAPT_PRODUCT(64, 32, 33, 34, 35, 36)
MMADAPT_PRODUCT(128, 64, 65, 66, 67, 68)
MMADAPT_PRODUCT(192, 96, 97, 98, 99, 100)
MMADAPT_PRODUCT(256, 128, 129, 130, 131, 132)
#undef MMADAPT_PRODUCT
#undef MMADAPT_WGMMA
#undef MMADAPT_SUMS16
#undef MMADAPT_SUMS32
#undef MMADAPT_SUMS64
#undef MMADAPT_SUMS128
#undef MMADAPT_SUMS192
#undef MMADAPT_SUMS256
#undef MMADAPT_LIST16
#undef MMADAPT_LIST32
#undef MMADAPT_LIST64
#undef MMADAPT_LIST128
#undef MMADAPT_LIST192
#undef MMADAPT_LIST256
#undef MMADAPT_D8
#undef MMADAPT_D16
#undef MMADAPT_D32
#undef MMADAPT_D64

}  // namespace mmadapt::hopper::gemm
