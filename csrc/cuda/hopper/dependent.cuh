// A kernel that is launched while the kernel before it on the stream still runs (programmatic dependent
// launch): its blocks find room where they can and wait, so that no launch lies between the two.
#pragma once

#include "../launch.cuh"

namespace mmadapt {

namespace hopper {

// In the kernel before: the next may be launched once every block has said so. Says nothing about memory.
__device__ __forceinline__ void allow_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// In the kernel after, before it touches what the other writes: waits until that has ended.
__device__ __forceinline__ void wait_for_predecessor() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

}  // namespace hopper

// `launch` for a kernel that begins with `wait_for_predecessor`.
template <class... Parameters, class... Arguments>
mmadapt_cuda_status launch_dependent(const Launch &how, void (*kernel)(Parameters...),
                                     Arguments &&...arguments) {
  if (how.blocks.x == 0 || how.blocks.y == 0 || how.blocks.z == 0) return ok();
  const mmadapt_cuda_status pending = pending_error(how.kernel);
  if (failed(pending)) return pending;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = how.blocks;
  config.blockDim = how.threads;
  config.dynamicSmemBytes = how.shared;
  config.stream = static_cast<cudaStream_t>(how.stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  const cudaError_t error =
      cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
  if (error != cudaSuccess) cudaGetLastError();
  return cuda_status(error, how.kernel);
}

}  // namespace mmadapt
