// dhidden = dlogits weight of up to eight listed rows, by one block: fp32 arithmetic, or tensor cores for
// 16-bit types.
#pragma once

#include <type_traits>

#include "gate_mma.cuh"
#include "gate_rows.cuh"

namespace mmadapt {

// A thread owns V columns of all rows.
template <class T, class W, int V>
__device__ __forceinline__ void expand(const float *dlogits, const W *__restrict__ weight,
                                       T *__restrict__ dhidden, const int32_t *rows, int count,
                                       int heads, int width) {
  for (int k = threadIdx.x * V; k < width; k += kRowThreads * V) {
    float sum[kRowWarps][V] = {};
#pragma unroll 8
    for (int head = 0; head < heads; ++head) {
      const Vec<W, V> w = load<W, V>(weight + static_cast<int64_t>(head) * width + k);
#pragma unroll
      for (int r = 0; r < kRowWarps; ++r) {
        const float d = dlogits[head * kRowWarps + r];
#pragma unroll
        for (int e = 0; e < V; ++e) sum[r][e] += d * to_float(w.at[e]);
      }
    }
#pragma unroll
    for (int r = 0; r < kRowWarps; ++r) {
      if (r < count) {
        Vec<T, V> out;
#pragma unroll
        for (int e = 0; e < V; ++e) out.at[e] = from_float<T>(sum[r][e]);
        store<T, V>(dhidden + static_cast<int64_t>(rows[r]) * width + k, out);
      }
    }
  }
}

// The same on tensor cores, 64 columns a warp and step: A is weight transposed (eight columns of
// four heads a lane), B dlogits, so that a lane ends up with eight adjacent columns of two rows.
template <class T, class W>
__device__ __forceinline__ void expand_mma(const float *dlogits, const W *__restrict__ weight,
                                           T *__restrict__ dhidden, const int32_t *rows, int count,
                                           int heads, int width) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group = lane / 4, quad = lane % 4;
  for (int base = warp * 64; base < width; base += kRowWarps * 64) {
    const int column = base + group * 8;
    const bool inside = column < width;
    float c[4][4] = {};
#pragma unroll 2
    for (int first = 0; first < heads; first += 16) {
      uint32_t k[4][4];
      float d[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int head = first + lane_k(quad, i);
        const bool there = head < heads;
        load_eight<T>(k[i], weight + static_cast<int64_t>(there ? head : 0) * width + column,
                      there && inside);
        d[i] = there ? dlogits[head * kRowWarps + group] : 0.f;
      }
      const uint32_t b0 = pack<T>(d[0], d[1]), b1 = pack<T>(d[2], d[3]);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        uint32_t a[4];
        transposed(a, k, j);
        mma(c[j], a, b0, b1, T{});
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = 2 * quad + half;
      if (r < count && inside) {
        Vec<T, 8> out;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          out.at[2 * j] = from_float<T>(c[j][half]);
          out.at[2 * j + 1] = from_float<T>(c[j][2 + half]);
        }
        store<T, 8>(dhidden + static_cast<int64_t>(rows[r]) * width + column, out);
      }
    }
  }
}

// The same for weights of the same type. A warp's steps, sixteen heads each, lie behind one another over all its columns. Under the copies of
// other blocks an access takes microseconds, so that weights of the next kStages steps are on their way,
// the first ones before dlogits are known: registers do not hold them, and each lane keeps its own in
// shared memory, where no other lane looks.
template <class T>
struct StagedWeights {
  static constexpr int kStages = 4, kColumns = 64;
  static constexpr int kBytes = kStages * 4 * kRowThreads * 16;

  uint32_t at;                   // this thread's first piece, in the window of shared memory
  int base, head = 0, slot = 0;  // of the next step to ask for

  __device__ __forceinline__ explicit StagedWeights(const void *shared)
      : at(static_cast<uint32_t>(__cvta_generic_to_shared(shared)) + 16 * threadIdx.x),
        base(threadIdx.x / 32 * kColumns) {}

  __device__ __forceinline__ uint32_t piece(int i) const {
    return at + (slot * 4 + i) * kRowThreads * 16;
  }

  __device__ __forceinline__ void ask(const T *__restrict__ weight, int heads, int width) {
    const int column = base + threadIdx.x % 32 / 4 * 8;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int h = head + lane_k(threadIdx.x % 4, i);
      const bool inside = h < heads && column < width;
      const T *from = weight + (inside ? static_cast<int64_t>(h) * width + column : 0);
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(piece(i)),
                   "l"(__cvta_generic_to_global(from)), "r"(inside ? 16 : 0)
                   : "memory");  // behind the end zeros
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
    if ((head += 16) >= heads) head = 0, base += kRowWarps * kColumns;
    slot = (slot + 1) % kStages;
  }

  __device__ __forceinline__ void start(const T *__restrict__ weight, int heads, int width) {
#pragma unroll 1
    for (int s = 0; s < kStages; ++s) ask(weight, heads, width);
  }

  // The oldest step asked for.
  __device__ __forceinline__ void take(uint32_t (&k)[4][4]) const {
    asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 1) : "memory");
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(k[i][0]), "=r"(k[i][1]), "=r"(k[i][2]), "=r"(k[i][3])
                   : "r"(piece(i))
                   : "memory");
    }
  }
};

// `staged` has been started.
template <class T>
__device__ __forceinline__ void expand_mma(const float *dlogits, StagedWeights<T> &staged,
                                           const T *__restrict__ weight, T *__restrict__ dhidden,
                                           const int32_t *rows, int count, int heads, int width) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group = lane / 4, quad = lane % 4;
  constexpr int kColumns = StagedWeights<T>::kColumns;
#pragma unroll 1
  for (int base = warp * kColumns; base < width; base += kRowWarps * kColumns) {
    float c[4][4] = {};
#pragma unroll 1
    for (int first = 0; first < heads; first += 16) {
      float d[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int head = first + lane_k(quad, i);
        d[i] = head < heads ? dlogits[head * kRowWarps + group] : 0.f;
      }
      const uint32_t b0 = pack<T>(d[0], d[1]), b1 = pack<T>(d[2], d[3]);
      uint32_t k[4][4];
      staged.take(k);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        uint32_t a[4];
        transposed(a, k, j);
        mma(c[j], a, b0, b1, T{});
      }
      staged.ask(weight, heads, width);
    }
    const int column = base + group * 8;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = 2 * quad + half;
      if (r < count && column < width) {
        Vec<T, 8> out;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          out.at[2 * j] = from_float<T>(c[j][half]);
          out.at[2 * j + 1] = from_float<T>(c[j][2 + half]);
        }
        store<T, 8>(dhidden + static_cast<int64_t>(rows[r]) * width + column, out);
      }
    }
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
}

}  // namespace mmadapt
