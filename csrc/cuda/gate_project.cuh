// tanh(weight hidden[t]) of sixteen heads for up to eight listed rows, by one block.
//
// 16-bit types: mma.sync m16n8k16 with heads as rows and tokens as columns, operands straight from
// global memory. The sum over k may go in any order, so lane q of a quad takes eight adjacent k in
// one access of 16 bytes, and feeds them to two products as k = 2q, 2q+1, 2q+8, 2q+9 of each: the
// same for both operands. The block's warps share k and add up in order. Other types and sizes:
// fp32 arithmetic, a warp per row.
#pragma once

#include "gate_mma.cuh"
#include "gate_rows.cuh"

namespace mmadapt {

constexpr int kGateHeads = 16;
using Gates = float[kRowWarps][kGateHeads];

// gates[r][i] (shared memory) and gate[rows[r], head] for head = first_head + i < heads and
// r < count <= 8. `width` is a multiple of 8, hidden and weight lie on 16 bytes. Ends in a
// __syncthreads.
template <class T, class W>
__device__ __forceinline__ void project_mma(const T *__restrict__ hidden,
                                            const W *__restrict__ weight, const int32_t *rows,
                                            int count, int first_head, int heads, int width,
                                            Gates &gates, float *__restrict__ gate) {
  __shared__ float parts[kRowWarps][kGateHeads][kRowWarps];  // by warp, head, row
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group = lane / 4, quad = lane % 4;
  const int low = first_head + group, high = low + 8;
  const bool row_inside = group < count, low_inside = low < heads, high_inside = high < heads;
  const T *x = hidden + (row_inside ? static_cast<int64_t>(rows[group]) * width : 0);
  const W *w_low = weight + (low_inside ? static_cast<int64_t>(low) * width : 0);
  const W *w_high = weight + (high_inside ? static_cast<int64_t>(high) * width : 0);
  constexpr int kSteps = 4, kStep = kRowWarps * 32;  // in flight at a time
  float c[4] = {};
  // All lanes of a warp go as often: each takes part in every product.
  for (int base = warp * 32; base < width; base += kSteps * kStep) {
    uint32_t b[kSteps][4], lo[kSteps][4], hi[kSteps][4];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int k = base + s * kStep + quad * 8;
      const bool k_inside = k < width;
      load_eight<T>(b[s], x + k, row_inside && k_inside);
      load_eight<T>(lo[s], w_low + k, low_inside && k_inside);
      load_eight<T>(hi[s], w_high + k, high_inside && k_inside);
    }
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const uint32_t a0[4] = {lo[s][0], hi[s][0], lo[s][1], hi[s][1]};
      const uint32_t a1[4] = {lo[s][2], hi[s][2], lo[s][3], hi[s][3]};
      mma(c, a0, b[s][0], b[s][1], T{});
      mma(c, a1, b[s][2], b[s][3], T{});
    }
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) parts[warp][group + 8 * (e / 2)][2 * quad + e % 2] = c[e];
  __syncthreads();
  const int i = threadIdx.x / kRowWarps, row = threadIdx.x % kRowWarps, head = first_head + i;
  if (i < kGateHeads && head < heads && row < count) {
    float logit = 0.f;
#pragma unroll
    for (int w = 0; w < kRowWarps; ++w) logit += parts[w][i][row];
    const float g = tanhf(logit);
    gates[row][i] = g;
    gate[static_cast<int64_t>(rows[row]) * heads + head] = g;
  }
  __syncthreads();  // gates are read by others; parts are written again
}

// The same with fp32 arithmetic; V divides width.
template <class T, class W, int V>
__device__ __forceinline__ void project_exact(const T *__restrict__ hidden,
                                              const W *__restrict__ weight, const int32_t *rows,
                                              int count, int first_head, int heads, int width,
                                              Gates &gates, float *__restrict__ gate) {
  constexpr int kBatch = 4;
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32;
  if (row < count) {
    const int64_t token = rows[row];
    const T *x = hidden + token * width;
    for (int first = 0; first < kGateHeads; first += kBatch) {
      float sum[kBatch] = {};
      for (int k = lane * V; k < width; k += 32 * V) {
        const Vec<T, V> states = load<T, V>(x + k);
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const int head = first_head + first + j;
          if (head < heads) {
            const Vec<W, V> w = load<W, V>(weight + static_cast<int64_t>(head) * width + k);
#pragma unroll
            for (int e = 0; e < V; ++e) sum[j] += to_float(states.at[e]) * to_float(w.at[e]);
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
#pragma unroll
        for (int delta = 16; delta > 0; delta /= 2) {
          sum[j] += __shfl_xor_sync(kWholeWarp, sum[j], delta);
        }
        const int head = first_head + first + j;
        if (lane == 0 && head < heads) {
          const float g = tanhf(sum[j]);
          gates[row][first + j] = g;
          gate[token * heads + head] = g;
        }
      }
    }
  }
  __syncthreads();
}

}  // namespace mmadapt
