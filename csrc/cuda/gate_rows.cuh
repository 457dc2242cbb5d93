// One row of values [heads, size], one warp: copied, gated, or differentiated.
//
// A row is `vectors` pieces of V numbers, `per_head` of them to a head (V divides size). Loads are
// made in batches before the stores, since the two may be the same memory as far as the compiler
// knows (in place they are).
#pragma once

#include "vec.cuh"

namespace mmadapt {

constexpr int kRowWarps = 8, kRowThreads = 32 * kRowWarps;  // rows per block and pass
constexpr int kMostHeads = 1024;                            // 8 rows of gates: 32 KB

// Grid for rows that are cut into blocks of kRowWarps.
inline int64_t row_blocks(int64_t tokens) { return (tokens + kRowWarps - 1) / kRowWarps; }

// each(i, vector i of the row) for this lane's share, loaded in batches.
template <int kBatch, class T, int V, class Each>
__device__ __forceinline__ void each_vector(const T *from, int vectors, int lane, Each each) {
  for (int first = lane; first < vectors; first += 32 * kBatch) {
    Vec<T, V> x[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int i = first + 32 * j;
      if (i < vectors) x[j] = load<T, V>(from + static_cast<int64_t>(i) * V);
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int i = first + 32 * j;
      if (i < vectors) each(i, x[j]);
    }
  }
}

template <class T, int V>
__device__ __forceinline__ void copy_row(const T *from, T *to, int vectors, int lane) {
  each_vector<8, T, V>(from, vectors, lane, [=](int i, const Vec<T, V> &x) {
    store<T, V>(to + static_cast<int64_t>(i) * V, x);
  });
}

template <class T, int V>
__device__ __forceinline__ void zero_row(T *to, int vectors, int lane) {
  Vec<T, V> zero;
#pragma unroll
  for (int e = 0; e < V; ++e) zero.at[e] = from_float<T>(0.f);
  for (int i = lane; i < vectors; i += 32) store<T, V>(to + static_cast<int64_t>(i) * V, zero);
}

template <class T, int V>
__device__ __forceinline__ Vec<T, V> scaled(Vec<T, V> x, float by) {
#pragma unroll
  for (int e = 0; e < V; ++e) x.at[e] = from_float<T>(to_float(x.at[e]) * by);
  return x;
}

// to = from * gate(head); `saved`, unless null, gets `from`. `to` may be `from`.
template <class T, int V, class Gate>
__device__ __forceinline__ void gate_row(const T *from, T *to, T *saved, int vectors, int per_head,
                                         int lane, Gate gate) {
  each_vector<4, T, V>(from, vectors, lane, [=](int i, const Vec<T, V> &x) {
    const int64_t at = static_cast<int64_t>(i) * V;
    if (saved != nullptr) store<T, V>(saved + at, x);
    store<T, V>(to + at, scaled<T, V>(x, gate(i / per_head)));
  });
}

// Lanes that share a head: the least power of two that holds it, at most a warp.
__device__ __forceinline__ int lanes_per_head(int per_head) {
  int lanes = 1;
  while (lanes < per_head && lanes < 32) lanes *= 2;
  return lanes;
}

// dvalue = dy * gate(head), unless null; put(head, sum over the head of dy * value) by one lane of
// each head, unless `value` is null. All lanes of the warp must take part.
template <class T, int V, class Gate, class Put>
__device__ __forceinline__ void backward_row(const T *__restrict__ dy, const T *__restrict__ value,
                                             T *__restrict__ dvalue, int heads, int per_head,
                                             int lane, Gate gate, Put put) {
  constexpr int kBatch = 2;
  const int lanes = lanes_per_head(per_head), step = 32 / lanes;  // heads at a time
  const int within = lane % lanes, own = lane / lanes;
  for (int first = own; first < heads + own; first += step * kBatch) {
    float sum[kBatch] = {};
    for (int i = within; i < per_head; i += lanes) {  // once, but for very large heads
      Vec<T, V> grad[kBatch], x[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int head = first + step * j;
        const int at = (head * per_head + i) * V;
        if (head < heads) {
          grad[j] = load<T, V>(dy + at);
          if (value != nullptr) x[j] = load<T, V>(value + at);
        }
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int head = first + step * j;
        const int at = (head * per_head + i) * V;
        if (head < heads) {
          if (value != nullptr) {
#pragma unroll
            for (int e = 0; e < V; ++e) sum[j] += to_float(grad[j].at[e]) * to_float(x[j].at[e]);
          }
          if (dvalue != nullptr) store<T, V>(dvalue + at, scaled<T, V>(grad[j], gate(head)));
        }
      }
    }
    if (value != nullptr) {
      __syncwarp();  // put may write where gate has read
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        for (int delta = lanes / 2; delta > 0; delta /= 2) {
          sum[j] += __shfl_xor_sync(kWholeWarp, sum[j], delta);
        }
        const int head = first + step * j;
        if (within == 0 && head < heads) put(head, sum[j]);
      }
    }
  }
}

}  // namespace mmadapt
