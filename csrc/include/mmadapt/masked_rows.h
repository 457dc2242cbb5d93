// CUDA: the positions of a mask's true entries, so that kernels can loop over masked rows alone.
#ifndef MMADAPT_MASKED_ROWS_H
#define MMADAPT_MASKED_ROWS_H

#include "mmadapt/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int64_t tokens;       // below 2^31
  const uint8_t *mask;  // [tokens], nonzero = true
  int32_t *rows;        // [tokens]: the true positions in ascending order; the rest is not written
  int32_t *count;       // [1]: how many there are
  void *stream;
} mmadapt_masked_rows;

mmadapt_cuda_status mmadapt_masked_rows_cuda(const mmadapt_masked_rows *problem);

#ifdef __cplusplus
}
#endif
#endif
