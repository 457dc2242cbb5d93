// out[n] = sum over p of parts[p, n], always in the same order.
#pragma once

#include "vec.cuh"

namespace mmadapt {

// Which rows of a list of `count` belong to part p of `parts`: [first, last).
__host__ __device__ __forceinline__ int32_t part_start(int32_t count, int32_t p, int32_t parts) {
  return static_cast<int32_t>(static_cast<int64_t>(count) * p / parts);
}

// `parts`: fp32 [count_parts, columns]. `rows`, unless null: length of the list that the parts cut
// up; a part without rows was not written and counts as zero.
mmadapt_cuda_status ordered_sum(const float *parts, int32_t count_parts, const int32_t *rows,
                                int64_t columns, void *out, int32_t dtype, void *stream);

}  // namespace mmadapt
