// CUDA for Hopper: gradients of the SwiGLU adapter's weights, from what the gradient of x leaves behind.
//
//   G = x^T dz, U = dy^T h, sums over all tokens with an expert
//   dgate, ddown = (norm_weight G)^T     dup = U     dnorm = sum over ranks of [gate; down] G^T + sums
//
// Activations are bf16 or fp16, weights of the same type or fp32; dim and rank are multiples of 8, arrays
// start at multiples of 16 bytes. dz and h hold a column for every rank of every expert, at most 128.
#ifndef MMADAPT_SWIGLU_WEIGHTS_CUDA_H
#define MMADAPT_SWIGLU_WEIGHTS_CUDA_H

#include "mmadapt/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int64_t tokens;
  int32_t dim, rank;
  int32_t dz_experts, h_experts;            // 0: neither dz (or h) nor what is made of it is there
  int32_t dtype, weight_dtype, norm_dtype;  // mmadapt_dtype
  const void *x, *dy;        // [tokens, dim]
  const void *dz;            // [2, tokens, dz_experts, rank]: gate's and down's
  const void *h;             // [tokens, h_experts, rank]
  const int32_t *expert;     // [tokens]; rows of x and dy whose expert is negative are not looked at
  const void *norm_weight;   // [dim]; null: no norm
  const void *gate, *down;   // [dz_experts, rank, dim], for dnorm
  const float *sums;         // [count_sums, dim], added to dnorm in this order
  int32_t count_sums;
  float *parts;              // as many as the plan says, for the sums of the splits
  void *dgate, *ddown;       // [dz_experts, rank, dim]; null: not needed, as below
  void *dup;                 // [h_experts, dim, rank]
  void *dnorm;               // [dim]
  void *stream;
} mmadapt_swiglu_weights_sm90;

typedef struct {
  int32_t width;          // columns of dz and of h are padded to it; 0: too many
  int32_t pair_blocks, up_blocks;  // blocks side by side over the columns of x, of dy
  int32_t splits;         // of the tokens: a function of the sizes alone
  int64_t parts;          // floats
} mmadapt_swiglu_weights_plan;

// `dz_columns`: dz_experts * rank; `h_columns` likewise.
mmadapt_swiglu_weights_plan mmadapt_swiglu_weights_plan_sm90(int64_t tokens, int32_t dim,
                                                             int32_t dz_columns, int32_t h_columns);
mmadapt_cuda_status mmadapt_swiglu_weights_cuda(const mmadapt_swiglu_weights_sm90 *p);

#ifdef __cplusplus
}
#endif
#endif
