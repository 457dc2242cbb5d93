// CUDA from sm_80 on: the SwiGLU adapter of swiglu_adapter.h, forward and the gradient of x.
//
// As swiglu_adapter_cuda.h, with the same limits and without a plan: dim up to 2^20 and any number of experts.
// Weights that are fp32, and gate and down behind a norm, are packed first: into `workspace`, of the
// activations' type, by a launch of its own.
#ifndef MMADAPT_SWIGLU_ADAPTER_PORTABLE_H
#define MMADAPT_SWIGLU_ADAPTER_PORTABLE_H

#include "mmadapt/cuda.h"
#include "mmadapt/swiglu_adapter.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int64_t tokens;
  int32_t dim, rank;
  int32_t experts, up_experts;              // gate, down: [experts, rank, dim]; up: [up_experts, dim, rank]
  int32_t dtype, weight_dtype, norm_dtype;  // mmadapt_dtype
  int32_t residual;                         // mmadapt_residual
  float scale, eps;
  int32_t stages;  // buffers of tiles, 2 to 8; 0: what lets two blocks run on an SM, or one at least
  const void *x;   // [tokens, dim]
  const void *gate, *down, *up;
  const int32_t *expert;    // [tokens], -1..experts-1; null: all rows expert 0
  const void *norm_weight;  // [dim]; null: no norm
  void *workspace;  // gate and down with fp32 weights or a norm, then up with fp32 weights; else null
  void *stream;
} mmadapt_swiglu_adapter_portable;

typedef struct {
  mmadapt_swiglu_adapter_portable problem;
  void *y;        // [tokens, dim]
  void *zg, *zd;  // [tokens, rank]: gate n and down n, 0 where expert is -1
  float *rstd;    // [tokens]; unused without norm
} mmadapt_swiglu_adapter_forward_portable;

typedef struct {
  mmadapt_swiglu_adapter_portable problem;
  const void *dy;       // [tokens, dim]
  const void *zg, *zd;  // as saved by forward
  const float *rstd;
  void *dx;  // [tokens, dim]
  // For the weights' gradients, null where not needed; zeros outside a token's own expert.
  void *dz;  // [2, tokens, dz_experts, rank]: gate's and down's, times rstd
  void *h;   // [tokens, h_experts, rank], times scale
  int32_t dz_experts, h_experts;
} mmadapt_swiglu_adapter_dx_portable;

mmadapt_cuda_status mmadapt_swiglu_adapter_forward_portable_cuda(
    const mmadapt_swiglu_adapter_forward_portable *p);
mmadapt_cuda_status mmadapt_swiglu_adapter_dx_portable_cuda(
    const mmadapt_swiglu_adapter_dx_portable *p);

#ifdef __cplusplus
}
#endif
#endif
