// CUDA: the SwiGLU adapter of swiglu_adapter.h, forward and the gradient of x; by kernels for Hopper, and by
// portable ones for GPUs from sm_80 on.
//
// Activations are bf16 or fp16, weights of the same type or fp32; dim and rank are multiples of 8, rank at
// most 128; dim at most 8192 and experts at most 32768 on Hopper, dim at most 2^20 for the portable kernels;
// arrays start at multiples of 16 bytes. Weights that are fp32, and gate and down behind a norm, are packed
// first, by a launch of its own.
#ifndef MMADAPT_SWIGLU_ADAPTER_CUDA_H
#define MMADAPT_SWIGLU_ADAPTER_CUDA_H

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
  int32_t cluster;  // Hopper: blocks that share a tile: 2, 4, 8; 0: chosen, with rows, for the least time
  int32_t rows;     // Hopper: of a tile: 64, 128, 256; 0: chosen
  // Portable: buffers of tiles, 2 to 8; 0: what lets two blocks run on an SM, or one at least.
  int32_t stages;
  const void *x;  // [tokens, dim]
  const void *gate, *down, *up;
  const int32_t *expert;    // [tokens], -1..experts-1; null: all rows expert 0
  const void *norm_weight;  // [dim]; null: no norm
  // Room for gate and down in dtype, where weight_dtype is another or there is a norm, and behind them for
  // up, where weight_dtype is another; else unused.
  void *packed;
  void *stream;
} mmadapt_swiglu_adapter_gpu;

typedef struct {
  mmadapt_swiglu_adapter_gpu problem;
  void *y;        // [tokens, dim]
  void *zg, *zd;  // [tokens, rank]: gate n and down n, 0 where expert is -1
  float *rstd;    // [tokens]; unused without norm
} mmadapt_swiglu_adapter_forward_gpu;

typedef struct {
  mmadapt_swiglu_adapter_gpu problem;
  const void *dy;       // [tokens, dim]
  const void *zg, *zd;  // as saved by forward
  const float *rstd;
  void *dx;  // [tokens, dim]
  // For the weights' gradients, null where not needed; zeros outside a token's own expert.
  void *dz;  // [2, tokens, dz_experts, rank]: gate's and down's, times rstd
  void *h;   // [tokens, h_experts, rank], times scale
  int32_t dz_experts, h_experts;
} mmadapt_swiglu_adapter_dx_gpu;

typedef struct {
  int32_t stages, weight_stages, shared_bytes;  // all 0: does not fit
} mmadapt_swiglu_adapter_plan;

// Hopper: what a launch with these settings (cluster and rows not 0) would use; with a norm, where its output is the
// residual, which takes the most room. Needs no GPU.
mmadapt_swiglu_adapter_plan mmadapt_swiglu_adapter_plan_sm90(int32_t dim, int32_t rank, int32_t norm,
                                                             int32_t backward, int32_t cluster,
                                                             int32_t rows);
mmadapt_cuda_status mmadapt_swiglu_adapter_forward_cuda(const mmadapt_swiglu_adapter_forward_gpu *p);
mmadapt_cuda_status mmadapt_swiglu_adapter_dx_cuda(const mmadapt_swiglu_adapter_dx_gpu *p);

mmadapt_cuda_status mmadapt_swiglu_adapter_forward_portable_cuda(
    const mmadapt_swiglu_adapter_forward_gpu *p);
mmadapt_cuda_status mmadapt_swiglu_adapter_dx_portable_cuda(const mmadapt_swiglu_adapter_dx_gpu *p);

#ifdef __cplusplus
}
#endif
#endif
