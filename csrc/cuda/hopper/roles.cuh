// Registers of a warpgroup's role, and kernels that overlap with the one before (PTX ISA, sm_90a).
#pragma once

namespace mmadapt::hopper {

// All warps of a warpgroup, first in the branch of its role. N: a multiple of 8.
template <int N>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// The next kernel on the stream may start, if it was launched with `overlap`.
__device__ __forceinline__ void allow_next_kernel() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
// Until the kernel before has ended and its stores are visible.
__device__ __forceinline__ void wait_for_previous_kernel() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

}  // namespace mmadapt::hopper
