// Status codes and type codes shared by all kernels. Plain C.
#ifndef MMADAPT_STATUS_H
#define MMADAPT_STATUS_H

typedef enum {
  MMADAPT_OK = 0,
  MMADAPT_OUT_OF_MEMORY = 1,
  MMADAPT_EXPERT_OUT_OF_RANGE = 2,
  MMADAPT_BAD_ARGUMENT = 3,
  MMADAPT_CUDA_ERROR = 4,
} mmadapt_status;

// The CPU kernels know the first two.
typedef enum { MMADAPT_F32 = 0, MMADAPT_BF16 = 1, MMADAPT_F16 = 2 } mmadapt_dtype;

#endif
