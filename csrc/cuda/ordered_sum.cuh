// out[n] = sum over p of parts[p, n], always in the same order.
#pragma once

#include "vec.cuh"

namespace mmadapt {

// `parts`: fp32 [count_parts, columns].
mmadapt_cuda_status ordered_sum(const float *parts, int32_t count_parts, int64_t columns, void *out,
                                int32_t dtype, void *stream);

}  // namespace mmadapt
