// A block owns 32 columns; warp w sums parts w, w + warps, ...; the warps' sums are added in order.

#include "ordered_sum.cuh"

namespace mmadapt {
namespace {

constexpr int kWarps = 32;

template <class T>
__global__ void __launch_bounds__(32 * kWarps)
    ordered_sum_kernel(const float *__restrict__ parts, int32_t count_parts, int64_t columns,
                       T *__restrict__ out) {
  __shared__ float sums[kWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  float sum = 0.f;
  if (column < columns) {
#pragma unroll 8
    for (int32_t p = warp; p < count_parts; p += kWarps) sum += parts[p * columns + column];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && column < columns) {
#pragma unroll
    for (int w = 1; w < kWarps; ++w) sum += sums[w][lane];
    out[column] = from_float<T>(sum);
  }
}

}  // namespace

mmadapt_cuda_status ordered_sum(const float *parts, int32_t count_parts, int64_t columns, void *out,
                                int32_t dtype, void *stream) {
  return with_type(dtype, "dtype of a sum", [&](auto t) {
    using T = typename decltype(t)::type;
    return launch({"ordered_sum_kernel", dim3(static_cast<unsigned>((columns + 31) / 32)),
                   dim3(32 * kWarps), 0, stream},
                  ordered_sum_kernel<T>, parts, count_parts, columns, static_cast<T *>(out));
  });
}

}  // namespace mmadapt
