// What the host hands to the kernels of the weights' gradients.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace mmadapt::swiglu_weights {

struct Arguments {
  CUtensorMap x, dy;         // boxes of 32 tokens x 64 columns
  CUtensorMap gate, down, h; // the halves of dz, and h: boxes of 32 tokens x 32 or 64 columns
  const int32_t *expert;     // null: every token counts
  // Sums in groups of eight ranks, those of a column of x (dy) side by side.
  float *pair_parts;         // [splits, 2, pair_columns / 8, dim, 8]
  float *up_parts;           // [splits, up_columns / 8, dim, 8]
  int64_t tokens;
  int32_t dim;
  int32_t pair_columns, up_columns;  // experts * rank
  int32_t pair_blocks, up_blocks;    // column blocks of x, of dy
  int32_t splits, tiles;
};

// One gradient: the sum over splits of parts[split * stride + i], in ascending order.
struct Sum {
  const float *parts;  // [splits, columns / 8, dim, 8]
  int64_t stride, count;
  void *out;           // [columns, dim], or [columns / rank, dim, rank]
  bool by_column;      // the latter
  bool weighted;       // times the norm's weight
};

struct SumArguments {
  Sum sums[3];  // dgate, ddown, dup: those that are needed
  const void *norm_weight;
  bool norm_is_fp32;
  int32_t splits, dim, rank;
};

struct NormArguments {
  const float *parts;       // [splits, 2, columns / 8, dim, 8]
  const void *gate, *down;  // [columns, dim]
  const float *sums;        // [count_sums, dim]
  void *out;                // [dim]
  bool norm_is_fp32;
  int32_t splits, columns, dim, count_sums;
};

}  // namespace mmadapt::swiglu_weights
