// What every CUDA launcher returns. Plain C; includes no CUDA header.
//
// A launcher takes one struct of raw device pointers, sizes and a stream (cudaStream_t as void *),
// queues its kernels on that stream of the current device and returns. It never waits for the
// device and allocates nothing.
#ifndef MMADAPT_CUDA_H
#define MMADAPT_CUDA_H

#include <stdint.h>

#include "mmadapt/status.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  mmadapt_status status;  // MMADAPT_OK, MMADAPT_BAD_ARGUMENT or MMADAPT_CUDA_ERROR
  int32_t error;          // cudaError_t, with MMADAPT_CUDA_ERROR
  int32_t earlier;        // 1: the error was pending before this launch, which did not take place
  const char *kernel;     // name of the kernel that failed (a literal), or of the bad argument
} mmadapt_cuda_status;

#ifdef __cplusplus
}
#endif
#endif
