// The second stage: the splits' sums added in ascending order, in the layout and dtype of the gradients.
// Partial sums lie in groups of eight ranks; a thread takes half a group of one column of x (or dy).
#pragma once

#include "../vec.cuh"
#include "arguments.h"

namespace mmadapt::swiglu_weights {
namespace {

constexpr int kSumThreads = 256;
constexpr int kSumWidth = 4;  // ranks a thread

template <class T>
__device__ __forceinline__ float number(const void *numbers, bool is_fp32, int64_t at) {
  return is_fp32 ? static_cast<const float *>(numbers)[at]
                 : to_float(static_cast<const T *>(numbers)[at]);
}

// Grid (blocks over the elements, gradients). W: the weights' type, T: that of activations, which the norm's
// weight has too where it is not fp32.
template <class T, class W>
__global__ void __launch_bounds__(kSumThreads)
    sum_splits_kernel(const __grid_constant__ SumArguments a) {
  const Sum &s = a.sums[blockIdx.y];
  const int64_t at = (int64_t(blockIdx.x) * kSumThreads + threadIdx.x) * kSumWidth;
  if (at >= s.count) return;
  float total[kSumWidth] = {};
  const float *parts = s.parts + at;
#pragma unroll 8
  for (int split = 0; split < a.splits; ++split) {
    const auto part = load<float, kSumWidth>(parts);
    parts += s.stride;
#pragma unroll
    for (int i = 0; i < kSumWidth; ++i) total[i] += part.at[i];
  }
  const int place = static_cast<int>(at / 8), column = place % a.dim;
  const int row = place / a.dim * 8 + static_cast<int>(at % 8);  // of all experts' ranks
  const float factor =
      s.weighted ? number<T>(a.norm_weight, a.norm_is_fp32, column) : 1.0f;
  Vec<W, kSumWidth> rounded;
#pragma unroll
  for (int i = 0; i < kSumWidth; ++i) rounded.at[i] = from_float<W>(total[i] * factor);
  W *out = static_cast<W *>(s.out);
  if (s.by_column) {
    store(out + (int64_t(row / a.rank) * a.dim + column) * a.rank + row % a.rank, rounded);
    return;
  }
#pragma unroll
  for (int i = 0; i < kSumWidth; ++i) out[int64_t(row + i) * a.dim + column] = rounded.at[i];
}

constexpr int kNormWarps = 16;

// dnorm[d] = sum over rows n of [gate; down] of weight[n, d] * (sum over splits of parts[n, d]), and then the
// given sums. A block owns 32 columns; warp w takes every 16th four rows; the warps' sums are added in order.
template <class T, class W>
__global__ void __launch_bounds__(32 * kNormWarps)
    norm_weight_kernel(const __grid_constant__ NormArguments a) {
  __shared__ float totals[kNormWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column = blockIdx.x * 32 + lane;
  const int rows = 2 * a.columns;
  float total = 0.0f;
  if (column < a.dim) {
    for (int n = kSumWidth * warp; n < rows; n += kSumWidth * kNormWarps) {
      const float *parts = a.parts + (int64_t(n / 8) * a.dim + column) * 8 + n % 8;
      float sum[kSumWidth] = {};
#pragma unroll 4
      for (int split = 0; split < a.splits; ++split) {
        const auto part = load<float, kSumWidth>(parts + int64_t(split) * rows * a.dim);
#pragma unroll
        for (int i = 0; i < kSumWidth; ++i) sum[i] += part.at[i];
      }
      const bool of_gate = n < a.columns;
      const W *weight = static_cast<const W *>(of_gate ? a.gate : a.down) +
                        int64_t(of_gate ? n : n - a.columns) * a.dim + column;
#pragma unroll
      for (int i = 0; i < kSumWidth; ++i) total += to_float(weight[int64_t(i) * a.dim]) * sum[i];
    }
    for (int n = warp; n < a.count_sums; n += kNormWarps) {
      total += a.sums[int64_t(n) * a.dim + column];
    }
  }
  totals[warp][lane] = total;
  __syncthreads();
  if (warp != 0 || column >= a.dim) return;
#pragma unroll
  for (int w = 1; w < kNormWarps; ++w) total += totals[w][lane];
  if (a.norm_is_fp32) {
    static_cast<float *>(a.out)[column] = total;
  } else {
    static_cast<T *>(a.out)[column] = from_float<T>(total);
  }
}

}  // namespace
}  // namespace mmadapt::swiglu_weights
