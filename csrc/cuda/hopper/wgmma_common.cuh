// What all products of warpgroups need (wgmma.cuh, wgmma_rows.cuh, wgmma_gemm.cuh): the order of asynchronous
// products, and the sums D as operands of inline assembly.
#pragma once

#include "wgmma_operands.cuh"

namespace mmadapt::hopper {

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Keeps the compiler from moving uses of the sums across a wait.
template <int N>
__device__ __forceinline__ void wgmma_pin(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// The N / 2 sums of a thread, d[0] .. d[N / 2 - 1]: their names in the text of an instruction, and themselves.
#define MMADAPT_NAMES_16                                                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7"
#define MMADAPT_NAMES_32                                                                            \
  MMADAPT_NAMES_16                                                                                  \
  ", %8, %9, %10, %11, %12, %13, %14, %15"
#define MMADAPT_NAMES_64                                                                            \
  MMADAPT_NAMES_32                                                                                  \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MMADAPT_NAMES_128                                                                           \
  MMADAPT_NAMES_64                                                                                  \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"                \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MMADAPT_NAMES_192                                                                           \
  MMADAPT_NAMES_128                                                                                 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"                \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define MMADAPT_NAMES_256                                                                           \
  MMADAPT_NAMES_192                                                                                 \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"    \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define MMADAPT_D8(i)                                                                               \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]),       \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define MMADAPT_D32(i) MMADAPT_D8(i), MMADAPT_D8(i + 8), MMADAPT_D8(i + 16), MMADAPT_D8(i + 24)
#define MMADAPT_SUMS_16 MMADAPT_D8(0)
#define MMADAPT_SUMS_32 MMADAPT_D8(0), MMADAPT_D8(8)
#define MMADAPT_SUMS_64 MMADAPT_D32(0)
#define MMADAPT_SUMS_128 MMADAPT_D32(0), MMADAPT_D32(32)
#define MMADAPT_SUMS_192 MMADAPT_SUMS_128, MMADAPT_D32(64)
#define MMADAPT_SUMS_256 MMADAPT_SUMS_192, MMADAPT_D32(96)

}  // namespace mmadapt::hopper
