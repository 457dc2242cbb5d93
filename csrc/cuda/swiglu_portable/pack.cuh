// The adapter's weights as the portable kernels read them: in the activations' type, the norm's weight
// multiplied into gate and down (in fp32, rounded once).
#pragma once

#include "vec.cuh"

namespace mmadapt::portable {

constexpr int kPackThreads = 256, kPacked = 8;  // numbers a thread: none crosses a row

template <class T, class W>
struct PackArguments {
  const W *gate, *down, *up;
  const void *norm_weight;  // [dim] of gate's and down's rows, or null
  bool norm_is_fp32;
  T *to;                 // gate, down, and where `total` says so up
  int64_t count, total;  // numbers of gate; of all
  int dim;
};

template <class T, class W>
__global__ void __launch_bounds__(kPackThreads) pack_kernel(PackArguments<T, W> a) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x) * kPacked;
  if (at >= a.total) return;
  const int64_t within = at < a.count ? at : at < 2 * a.count ? at - a.count : at - 2 * a.count;
  const W *from = at < a.count ? a.gate : at < 2 * a.count ? a.down : a.up;
  const Vec<W, kPacked> weights = load<W, kPacked>(from + within);
  Vec<float, kPacked> factors;
#pragma unroll
  for (int e = 0; e < kPacked; ++e) factors.at[e] = 1.f;
  if (a.norm_weight != nullptr && at < 2 * a.count) {
    const int column = static_cast<int>(within % a.dim);
    if (a.norm_is_fp32) {
      factors = load<float, kPacked>(static_cast<const float *>(a.norm_weight) + column);
    } else {
      const auto norm = load<T, kPacked>(static_cast<const T *>(a.norm_weight) + column);
#pragma unroll
      for (int e = 0; e < kPacked; ++e) factors.at[e] = to_float(norm.at[e]);
    }
  }
  Vec<T, kPacked> out;
#pragma unroll
  for (int e = 0; e < kPacked; ++e) {
    out.at[e] = from_float<T>(to_float(weights.at[e]) * factors.at[e]);
  }
  store<T, kPacked>(a.to + at, out);
}

}  // namespace mmadapt::portable
