// A kernel that may start before the one in front of it on the stream ends: its launch has `overlap`.
//
// Programmatic dependent launch (PTX ISA: griddepcontrol), from sm_90 on. Code compiled for less has
// neither instruction, and must then not be launched so, whatever the device: `can_overlap` asks.
#pragma once

#include <cuda_runtime.h>

namespace mmadapt {

// The next kernel on the stream may start when all blocks of this one have come here or ended.
__device__ __forceinline__ void allow_overlap() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Until the kernel before has ended and its stores are visible. Some block has to call this in any
// case: whoever waits for this kernel alone relies on both.
__device__ __forceinline__ void wait_for_overlapped() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Whether the current device runs code of `kernel` that waits. An error counts as no; the launch
// reports it.
template <class Kernel>
bool can_overlap(Kernel *kernel) {
  cudaFuncAttributes attributes;
  if (cudaPeekAtLastError() != cudaSuccess) return false;
  if (cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess) return attributes.ptxVersion >= 90;
  cudaGetLastError();
  return false;
}

// The same division of an SM between shared memory and cache for kernels that overlap: no SM changes its
// division while a block runs there. A hint. 58 %: 132 KB of an H100, two blocks of 64, and the other
// half for loads on their way.
template <class Kernel>
void prefer_shared_memory(Kernel *kernel) {
  if (cudaPeekAtLastError() != cudaSuccess) return;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 58) !=
      cudaSuccess) {
    cudaGetLastError();
  }
}

}  // namespace mmadapt
