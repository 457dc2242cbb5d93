// SwiGLU adapter on the CPU: y = base + scale * up(silu(gate n) * (down n)), routed by expert.
//
// n is x, or rms_norm(x) * norm_weight; base is x, n or 0. All arrays are contiguous, row-major and
// of the dtype named; accumulation is fp32. Plain C, no torch: the caller allocates every output.
#ifndef MMADAPT_SWIGLU_ADAPTER_H
#define MMADAPT_SWIGLU_ADAPTER_H

#include <stdint.h>

#include "mmadapt/status.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  MMADAPT_RESIDUAL_NONE = 0,
  MMADAPT_RESIDUAL_INPUT = 1,
  MMADAPT_RESIDUAL_NORM = 2,
} mmadapt_residual;

typedef struct {
  int64_t tokens, dim, rank;
  int64_t experts;     // gate and down: [experts, rank, dim]
  int64_t up_experts;  // up: [up_experts, dim, rank]; 1 = shared by all experts
  int32_t activation_dtype, weight_dtype, norm_dtype;  // mmadapt_dtype
  int32_t residual;                                    // mmadapt_residual
  float scale, eps;
  int32_t threads;
  const void *x;            // [tokens, dim]
  const void *gate, *down;  // [experts, rank, dim]
  const void *up;           // [up_experts, dim, rank]
  const int32_t *expert;    // [tokens], -1..experts-1, -1 = base alone; null = all rows expert 0
  const void *norm_weight;  // [dim]; null = no norm
} mmadapt_swiglu_adapter;

typedef struct {
  void *y;       // [tokens, dim], activation dtype
  void *zg, *zd; // [tokens, rank], activation dtype: gate n and down n, 0 where expert is -1
  float *rstd;   // [tokens]; unused without norm
} mmadapt_swiglu_adapter_outputs;

typedef struct {
  const void *dy;        // [tokens, dim]
  const void *zg, *zd;   // as saved by forward
  const float *rstd;
  void *dx;              // activation dtype; null = not needed, as for all gradients below
  void *dgate, *ddown, *dup;  // weight dtype
  void *dnorm;           // norm dtype
} mmadapt_swiglu_adapter_gradients;

mmadapt_status mmadapt_swiglu_adapter_forward(const mmadapt_swiglu_adapter *problem,
                                              const mmadapt_swiglu_adapter_outputs *outputs);
mmadapt_status mmadapt_swiglu_adapter_backward(const mmadapt_swiglu_adapter *problem,
                                               const mmadapt_swiglu_adapter_gradients *gradients);

// Instruction set that runs on this machine ("generic", "avx2", "avx512"); MMADAPT_CPU_ISA in the
// environment caps it, for tests. The second lists those compiled in.
const char *mmadapt_cpu_isa(void);
const char *mmadapt_cpu_isa_compiled(void);

#ifdef __cplusplus
}
#endif
#endif
