// Launching a kernel, with the launch's own error as the result.
#pragma once

#include <cuda_runtime.h>

#include <utility>

#include "mmadapt/cuda.h"

namespace mmadapt {

inline mmadapt_cuda_status ok() { return {MMADAPT_OK, 0, 0, nullptr}; }

// `argument`: a literal, what is wrong with which argument.
inline mmadapt_cuda_status bad_argument(const char *argument) {
  return {MMADAPT_BAD_ARGUMENT, 0, 0, argument};
}

// For a runtime or driver call that a launcher needs besides launches.
inline mmadapt_cuda_status cuda_status(cudaError_t error, const char *kernel) {
  return {error == cudaSuccess ? MMADAPT_OK : MMADAPT_CUDA_ERROR, static_cast<int32_t>(error), 0,
          kernel};
}

inline bool failed(const mmadapt_cuda_status &status) { return status.status != MMADAPT_OK; }

struct Launch {
  const char *kernel;  // a literal, for messages
  dim3 blocks, threads;
  size_t shared = 0;  // bytes of dynamic shared memory; above 48 KB the kernel is told
  void *stream = nullptr;
  // Blocks per cluster, along x. 0: the kernel uses no clusters; one that does needs its 1 said, or its
  // cluster instructions are illegal.
  unsigned cluster = 0;
  bool told = false;  // the kernel has its limit of shared memory already
  // May start before the kernel in front of it ends, if that one allows it, and waits for it itself.
  bool overlap = false;
};

// The error of an earlier call that nobody has asked for yet, as the status of a launch that did not take
// place; it is left where it is.
inline mmadapt_cuda_status pending_error(const char *kernel) {
  const cudaError_t before = cudaPeekAtLastError();
  // Without a driver or a device every call answers so, the first one too.
  const bool earlier = before != cudaSuccess && before != cudaErrorInsufficientDriver &&
                       before != cudaErrorNoDevice;
  return {before == cudaSuccess ? MMADAPT_OK : MMADAPT_CUDA_ERROR, static_cast<int32_t>(before),
          earlier, kernel};
}

// Queues `kernel(arguments...)`. No blocks: nothing is queued.
//
// The error of an earlier call that nobody has asked for yet is reported as such and left where it
// is; this launch's own is taken out, so that it cannot be mistaken for that of the next.
template <class... Parameters, class... Arguments>
mmadapt_cuda_status launch(const Launch &how, void (*kernel)(Parameters...),
                           Arguments &&...arguments) {
  if (how.blocks.x == 0 || how.blocks.y == 0 || how.blocks.z == 0) return ok();
  const mmadapt_cuda_status pending = pending_error(how.kernel);
  if (failed(pending)) return pending;
  cudaError_t error = cudaSuccess;
  if (how.shared > 48 * 1024 && !how.told) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(how.shared));
  }
  if (error == cudaSuccess) {
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config = {};
    config.gridDim = how.blocks;
    config.blockDim = how.threads;
    config.dynamicSmemBytes = how.shared;
    config.stream = static_cast<cudaStream_t>(how.stream);
    config.attrs = attributes;
    if (how.cluster > 0) {
      attributes[0].id = cudaLaunchAttributeClusterDimension;
      attributes[0].val.clusterDim.x = how.cluster;
      attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
      config.numAttrs = 1;
    }
    if (how.overlap) {
      attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    error = cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
  }
  if (error != cudaSuccess) cudaGetLastError();
  return cuda_status(error, how.kernel);
}

}  // namespace mmadapt
