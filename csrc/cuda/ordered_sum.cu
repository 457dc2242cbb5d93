// A block owns 32 columns; warp w sums parts w, w + warps, ...; the warps' sums are added in order.

#include "ordered_sum.cuh"

namespace mmadapt {
namespace {

template <class T, int kWarps, bool kListed>
__global__ void __launch_bounds__(32 * kWarps)
    ordered_sum_kernel(const float *__restrict__ parts, int32_t count_parts,
                       const int32_t *__restrict__ rows, int64_t columns, T *__restrict__ out) {
  __shared__ float sums[kWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  const int32_t listed = kListed ? *rows : 0;
  float sum = 0.f;
  if (column < columns) {
#pragma unroll (kListed ? 4 : 8)
    for (int32_t p = warp; p < count_parts; p += kWarps) {
      const bool written =
          !kListed || part_start(listed, p, count_parts) < part_start(listed, p + 1, count_parts);
      sum += written ? parts[p * columns + column] : 0.f;
    }
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

mmadapt_cuda_status ordered_sum(const float *parts, int32_t count_parts, const int32_t *rows,
                                int64_t columns, void *out, int32_t dtype, void *stream) {
  return with_type(dtype, "dtype of a sum", [&](auto t) {
    using T = typename decltype(t)::type;
    const dim3 blocks(static_cast<unsigned>((columns + 31) / 32));
    auto *to = static_cast<T *>(out);
    // Many parts of few columns, or a list's few parts of many.
    if (rows == nullptr) {
      return launch({"ordered_sum_kernel", blocks, dim3(32 * 32), 0, stream},
                    ordered_sum_kernel<T, 32, false>, parts, count_parts, rows, columns, to);
    }
    return launch({"ordered_sum_kernel", blocks, dim3(32 * 4), 0, stream},
                  ordered_sum_kernel<T, 4, true>, parts, count_parts, rows, columns, to);
  });
}

}  // namespace mmadapt
