// What every launcher of the SwiGLU adapter refuses.
#pragma once

#include "mmadapt/swiglu_adapter_cuda.h"
#include "vec.cuh"

namespace mmadapt {

struct AdapterLimits {
  int64_t tokens;
  int dim;
  const char *dim_text;  // the refusal of another dim
  int experts;
  const char *experts_text;
};

// The constraint that fails, or null; what depends on the kernels (settings of tiles, addresses) is not here.
inline const char *adapter_refusal(const mmadapt_swiglu_adapter_gpu &p, const AdapterLimits &limits) {
  if (p.dtype != MMADAPT_BF16 && p.dtype != MMADAPT_F16) return "dtype: expected bf16 or fp16";
  if (p.weight_dtype != p.dtype && p.weight_dtype != MMADAPT_F32) {
    return "weight_dtype: expected dtype or fp32";
  }
  if (p.norm_dtype != p.dtype && p.norm_dtype != MMADAPT_F32) return "norm_dtype: expected dtype or fp32";
  if (p.tokens < 1 || p.tokens > limits.tokens) return "tokens: out of range";
  if (p.dim < 8 || p.dim % 8 != 0 || p.dim > limits.dim) return limits.dim_text;
  if (p.rank < 8 || p.rank % 8 != 0 || p.rank > 128) return "rank: expected a multiple of 8, at most 128";
  if (p.experts > limits.experts) return limits.experts_text;
  if (p.experts < 1 || (p.up_experts != 1 && p.up_experts != p.experts)) {
    return "up_experts: expected 1 or as many as experts";
  }
  if (p.experts > 1 && p.expert == nullptr) return "expert: absent, with several experts";
  if (p.residual < MMADAPT_RESIDUAL_NONE || p.residual > MMADAPT_RESIDUAL_NORM) {
    return "residual: out of range";
  }
  if (p.residual == MMADAPT_RESIDUAL_NORM && p.norm_weight == nullptr) {
    return "norm_weight: absent, with the norm as residual";
  }
  return nullptr;
}

inline bool aligned_operands(const mmadapt_swiglu_adapter_gpu &p) {
  return aligned16(p.x) && aligned16(p.gate) && aligned16(p.down) && aligned16(p.up) &&
         aligned16(p.norm_weight) && aligned16(p.packed);
}

}  // namespace mmadapt
