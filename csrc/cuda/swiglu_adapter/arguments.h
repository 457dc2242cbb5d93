// What a launch passes to the Hopper kernels of the SwiGLU adapter.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "mmadapt/swiglu_adapter.h"
#include "plan.h"

namespace mmadapt::swiglu {

struct Arguments {
  CUtensorMap input;       // forward: x; backward: dy; in boxes of a tile's rows and 64 columns
  CUtensorMap second;      // backward behind a norm: x
  CUtensorMap output;      // y or dx, in boxes of 64 rows
  CUtensorMap gate, down;  // [E, m, d] in 16 bits, the norm's weight multiplied in; boxes [MP, 64]
  CUtensorMap up;          // [EU, d, m]; boxes [64, min(MP, 64)]
  Plan plan;
  int64_t tokens;
  int dim, rank, experts, up_experts;
  int norm_is_fp32;
  int residual;  // mmadapt_residual
  float scale, eps;
  const int32_t *expert;    // [T] or null
  const void *norm_weight;  // [d] or null
  void *zg, *zd;            // [T, m], written by forward, read by backward
  float *rstd;              // [T], likewise
  // Backward, for the weights' gradients; null where nobody needs them. A row holds m columns, or m for
  // each expert with zeros in the others' ("spread").
  void *dz;  // [2, T, dz_experts * m]
  void *h;   // [T, h_experts * m]
  int dz_experts, h_experts;
};

}  // namespace mmadapt::swiglu
