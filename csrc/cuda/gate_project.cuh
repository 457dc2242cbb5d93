// tanh(weight hidden[t]) of sixteen heads for up to eight listed rows, by one block.
//
// 16-bit types: mma.sync m16n8k16 with heads as rows and tokens as columns, operands straight from
// global memory. The sum over k may go in any order, so lane q of a quad takes eight adjacent k in
// one access of 16 bytes, and feeds them to two products as k = 2q, 2q+1, 2q+8, 2q+9 of each: the
// same for both operands. The block's warps share k and add up in order. The first weights are loaded
// by a call of its own, in front of what tells the rows. Other types and sizes: fp32 arithmetic, a warp
// per row.
#pragma once

#include "gate_mma.cuh"
#include "gate_rows.cuh"

namespace mmadapt {

constexpr int kGateHeads = 16;
using Gates = float[kRowWarps][kGateHeads];

constexpr int kProjectStep = kRowWarps * 32;  // of k, by the whole block

// A lane's weights of sixteen heads: kSteps steps from `base` on.
template <class T, class W, int kSteps>
struct ProjectWeights {
  uint32_t low[kSteps][4], high[kSteps][4];  // of heads `lane / 4` and eight more

  __device__ __forceinline__ void load(const W *__restrict__ weight, int first_head, int base,
                                       int heads, int width) {
    const int lane = threadIdx.x % 32, head = first_head + lane / 4;
    const int own = threadIdx.x / 32 * 32 + lane % 4 * 8;
    const W *from = weight + static_cast<int64_t>(head) * width;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int k = base + s * kProjectStep + own;
      const bool low_inside = head < heads && k < width, high_inside = head + 8 < heads && k < width;
      load_eight<T>(low[s], low_inside ? from + k : weight, low_inside);
      load_eight<T>(high[s], high_inside ? from + 8 * static_cast<int64_t>(width) + k : weight,
                    high_inside);
    }
  }
};

// gates[r][i] (shared memory) and gate[rows[r], head] for head = first_head + i < heads and
// r < count <= 8. `w`: the weights from k = 0 on, used up. `width` is a multiple of 8, hidden and
// weight lie on 16 bytes. Ends in a __syncthreads.
template <class T, class W, int kSteps>
__device__ __forceinline__ void project_mma(const T *__restrict__ hidden,
                                            const W *__restrict__ weight,
                                            ProjectWeights<T, W, kSteps> &w, const int32_t *rows,
                                            int count, int first_head, int heads, int width,
                                            Gates &gates, float *__restrict__ gate) {
  __shared__ float parts[kRowWarps][kGateHeads][kRowWarps];  // by warp, head, row
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group = lane / 4, quad = lane % 4;
  const bool row_inside = group < count;
  const T *x = hidden + (row_inside ? static_cast<int64_t>(rows[group]) * width : 0);
  if (warp < count) {
    const int64_t row_bytes = static_cast<int64_t>(width) * sizeof(T);
    prefetch(hidden + static_cast<int64_t>(rows[warp]) * width, row_bytes, lane, 32);
  }
  const auto load_rows = [&](uint32_t(&b)[kSteps][4], int base) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int k = base + s * kProjectStep + warp * 32 + quad * 8;
      load_eight<T>(b[s], x + k, row_inside && k < width);
    }
  };
  float c[2][4] = {};
  uint32_t b[kSteps][4], next[kSteps][4];
  load_rows(b, 0);
  // All threads go as often: each lane takes part in every product. Behind the last k: zeros.
  for (int base = 0; base < width; base += kSteps * kProjectStep) {
    const int then = base + kSteps * kProjectStep;
    load_rows(next, then);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const uint32_t a0[4] = {w.low[s][0], w.high[s][0], w.low[s][1], w.high[s][1]};
      const uint32_t a1[4] = {w.low[s][2], w.high[s][2], w.low[s][3], w.high[s][3]};
      mma(c[0], a0, b[s][0], b[s][1], T{});
      mma(c[1], a1, b[s][2], b[s][3], T{});
    }
    w.load(weight, first_head, then, heads, width);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) b[s][i] = next[s][i];
    }
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) parts[warp][group + 8 * (e / 2)][2 * quad + e % 2] = c[0][e] + c[1][e];
  __syncthreads();
  const int i = threadIdx.x / kRowWarps, row = threadIdx.x % kRowWarps, head = first_head + i;
  if (i < kGateHeads && head < heads && row < count) {
    float logit = 0.f;
#pragma unroll
    for (int p = 0; p < kRowWarps; ++p) logit += parts[p][i][row];
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
