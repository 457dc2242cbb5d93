// Weights as the products want them: 16 bits, the norm's weight multiplied into gate and down.
//
// One pass before the kernels of the SwiGLU adapter, only where the weights are fp32 or a norm is fused: every
// tile would otherwise convert them again.
#pragma once

#include "hopper/roles.cuh"
#include "mmadapt/swiglu_adapter_cuda.h"
#include "vec.cuh"

namespace mmadapt {

constexpr int kPackThreads = 256;
constexpr char kPackName[] = "pack_weights_kernel";

struct Pack {
  const void *gate, *down, *up, *norm_weight;
  void *packed;               // gate, down and, where `total` says so, up, one behind another
  int64_t projection, total;  // numbers in gate; in all
  int dim;
  bool weight_is_fp32, norm_is_fp32;
};

// Eight neighbours as fp32.
template <class T>
__device__ __forceinline__ void load8(float (&v)[8], const void *from, int64_t at, bool is_fp32) {
  if (is_fp32) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto four = load<float, 4>(static_cast<const float *>(from) + at + 4 * half);
#pragma unroll
      for (int i = 0; i < 4; ++i) v[4 * half + i] = four.at[i];
    }
  } else {
    const auto eight = load<T, 8>(static_cast<const T *>(from) + at);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = to_float(eight.at[i]);
  }
}

namespace {  // one in each object: they are compiled for different architectures

template <class T>
__global__ void __launch_bounds__(kPackThreads) pack_weights_kernel(Pack p) {
#if __CUDA_ARCH__ >= 900
  hopper::allow_next_kernel();  // the adapter's
#endif
  const int64_t at = (int64_t(blockIdx.x) * kPackThreads + threadIdx.x) * 8;
  if (at >= p.total) return;
  const bool is_up = at >= 2 * p.projection;
  float v[8];
  if (is_up) {
    load8<T>(v, p.up, at - 2 * p.projection, p.weight_is_fp32);
  } else {
    const int64_t own = at < p.projection ? at : at - p.projection;
    load8<T>(v, at < p.projection ? p.gate : p.down, own, p.weight_is_fp32);
    if (p.norm_weight != nullptr) {
      float g[8];
      load8<T>(g, p.norm_weight, own % p.dim, p.norm_is_fp32);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] *= g[i];
    }
  }
  Vec<T, 8> out;
#pragma unroll
  for (int i = 0; i < 8; ++i) out.at[i] = from_float<T>(v[i]);
  store(static_cast<T *>(p.packed) + at, out);
}

}  // namespace

// The adapter's weights as 16-bit matrices: the problem's own, or packed.
struct PackedWeights {
  const void *gate, *down, *up;
};

// Whether weights of this problem have to be packed.
inline bool packs(const mmadapt_swiglu_adapter_gpu &p) {
  return p.weight_dtype != p.dtype || p.norm_weight != nullptr;
}

// T: the problem's dtype.
template <class T>
mmadapt_cuda_status pack_weights(const mmadapt_swiglu_adapter_gpu &p, PackedWeights *weights) {
  *weights = {p.gate, p.down, p.up};
  if (!packs(p)) return ok();
  const bool converts = p.weight_dtype != p.dtype;
  const int64_t matrix = int64_t(p.rank) * p.dim, projection = p.experts * matrix;
  const int64_t total = 2 * projection + (converts ? p.up_experts * matrix : 0);
  T *to = static_cast<T *>(p.packed);
  weights->gate = to;
  weights->down = to + projection;
  if (converts) weights->up = to + 2 * projection;
  const Pack pack = {p.gate, p.down, p.up, p.norm_weight, p.packed, projection, total, p.dim,
                     p.weight_dtype == MMADAPT_F32, p.norm_dtype == MMADAPT_F32};
  const int64_t blocks = (total / 8 + kPackThreads - 1) / kPackThreads;
  return launch({kPackName, dim3(static_cast<unsigned>(blocks)), dim3(kPackThreads), 0, p.stream},
                &pack_weights_kernel<T>, pack);
}

}  // namespace mmadapt
