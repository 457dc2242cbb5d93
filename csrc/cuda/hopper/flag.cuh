// Flags in global memory, by which blocks of one launch tell each other that data are ready (PTX ISA, memory
// consistency model and proxies).
#pragma once

#include <cstdint>

namespace mmadapt::hopper {

// Ordinary accesses to global memory before and TMA on the same memory after, or the other way round.
__device__ __forceinline__ void fence_async_proxy_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

// What this thread has written comes before a flag that another thread raises after it met this one in a barrier.
__device__ __forceinline__ void fence_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// What this thread has written, and what others had fenced before it met them in a barrier, is visible to
// whoever sees the flag with await_flag.
__device__ __forceinline__ void raise_flag(uint32_t *flag) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(1u) : "memory");
}

// Until the flag is not 0.
__device__ __forceinline__ void await_flag(const uint32_t *flag) {
  uint32_t value;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  } while (value == 0);
}

}  // namespace mmadapt::hopper
