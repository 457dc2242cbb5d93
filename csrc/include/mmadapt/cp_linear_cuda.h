// CUDA, Hopper: the factored linear layer, y_k = x W_k^T + bias_k + core_k factor_out^T with
// core_k = scale * (x factor_in^T) M_k: project() makes the cores, gemm() each y; or, with mode vectors alone,
// fused() makes the cores and the first y, and gemm() the others.
//
// Activations and weights are bf16 or fp16 (`dtype`), row-major and contiguous, at addresses that are
// multiples of 16; row lengths are multiples of 8. Sums are fp32.
#ifndef MMADAPT_CP_LINEAR_CUDA_H
#define MMADAPT_CP_LINEAR_CUDA_H

#include "mmadapt/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

#define MMADAPT_CP_LINEAR_MAX_GROUP 8  // weights on one x
#define MMADAPT_CP_LINEAR_MAX_RANK 128

typedef enum {
  MMADAPT_DROPOUT_NONE = 0,
  MMADAPT_DROPOUT_BEFORE = 1,  // drops entries of z
  MMADAPT_DROPOUT_AFTER = 2,   // drops entries of z M
} mmadapt_dropout;

// z = x factor_in^T and core_k = scale * z M_k, x read once.
typedef struct {
  int64_t tokens;
  int32_t dim, rank;
  int32_t count;  // of modes: 1..MAX_GROUP
  int32_t dtype;
  int32_t dense, wide;  // bit k: mode k is [rank, rank], not [rank]; is fp32, not of dtype
  int32_t dropout;      // mmadapt_dropout
  int32_t threshold;    // of the hash's 24 bits: entries below it are dropped
  float kept, scale;    // kept: factor on the others
  int32_t split;        // parts of dim: 1, 2, 4, 8; 0: about one block an SM
  const void *x;          // [tokens, dim]
  const void *factor_in;  // [rank, dim] in dtype
  const void *mode[MMADAPT_CP_LINEAR_MAX_GROUP];
  const int64_t *seeds;  // [count], with dropout
  void *z;               // [tokens, rank]
  void *core;            // [count, tokens, rank]
  void *stream;
} mmadapt_cp_linear_project_sm90;

// y = sum over k of left_k right_k^T, + core factor^T + bias; or with right_k and factor as they are.
typedef struct {
  int64_t tokens;
  int32_t inner, columns;      // left_k: [tokens, inner], y: [tokens, columns]
  int32_t rank, core_columns;  // core: [tokens, core_columns], its first `rank` columns; 0: no such term
  int32_t count;               // 1..MAX_GROUP
  int32_t dtype, bias_dtype;   // bias: dtype or F32
  int32_t transposed;          // 0: right_k [columns, inner], factor [columns, rank]; 1: the transposes
  int32_t tile;                // columns of a tile: 256, 192, 128; 0: by shape
  int32_t cluster;             // blocks that share a tile of right: 1, 2; 0: by shape
  int32_t group;               // row tiles that are walked through together; 0: 16
  int32_t overlap;  // 1: starts beside the kernel in front of it, which makes core and nothing else of it
  const void *left[MMADAPT_CP_LINEAR_MAX_GROUP], *right[MMADAPT_CP_LINEAR_MAX_GROUP];
  const void *core, *factor, *bias;  // bias: null for none
  void *y;
  void *stream;
} mmadapt_cp_linear_gemm_sm90;

// The cores of project(), with mode vectors, and y = x weight^T + core_0 factor_out^T + bias of gemm().
typedef struct {
  int64_t tokens;
  int32_t inner, columns, rank;  // rank: of z and all cores
  int32_t count;                 // of modes, as in project()
  int32_t dtype, bias_dtype, wide;
  int32_t dropout, threshold;
  float kept, scale;
  int32_t tile, cluster, group;  // as in gemm()
  int32_t overlap;               // 1: starts beside a kernel of the launcher's own, in front of it
  const void *x, *weight;        // [tokens, inner], [columns, inner]
  const void *factor_in, *factor_out, *bias;
  const void *mode[MMADAPT_CP_LINEAR_MAX_GROUP];  // [rank]
  const int64_t *seeds;
  void *z, *core;    // of all modes
  void *y;           // of the first one
  void *words;       // `words_size` 32-bit words, at least mmadapt_cp_linear_fused_words(tokens)
  int64_t words_size;
  void *stream;
} mmadapt_cp_linear_fused_sm90;

// What fused() does with z on a GPU of 132 multiprocessors: csrc/cuda/cp_linear/gemm_project.cuh has the terms.
typedef struct {
  int32_t units, parcels;
  int32_t hidden;  // 1: in time in which multiprocessors would have had no tile
} mmadapt_cp_linear_fused_plan;

// 16-bit copies of two fp32 arrays (the factors); a size of 0: of one. Sizes are multiples of 8.
typedef struct {
  int64_t first_size, second_size;
  int32_t dtype;
  const float *first, *second;
  void *first_out, *second_out;
  void *stream;
} mmadapt_cp_linear_pack_sm90;

mmadapt_cuda_status mmadapt_cp_linear_project_cuda(const mmadapt_cp_linear_project_sm90 *p);
mmadapt_cuda_status mmadapt_cp_linear_gemm_cuda(const mmadapt_cp_linear_gemm_sm90 *p);
mmadapt_cuda_status mmadapt_cp_linear_fused_cuda(const mmadapt_cp_linear_fused_sm90 *p);
mmadapt_cp_linear_fused_plan mmadapt_cp_linear_plan_fused(int64_t tokens, int32_t columns, int32_t rank);
int64_t mmadapt_cp_linear_fused_words(int64_t tokens);
mmadapt_cuda_status mmadapt_cp_linear_pack_cuda(const mmadapt_cp_linear_pack_sm90 *p);

#ifdef __cplusplus
}
#endif
#endif
