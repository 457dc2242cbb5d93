// One access to global memory, written out so that the compiler does not take it apart.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace mmadapt {

__device__ __forceinline__ void store_word(void *to, uint4 x) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}
__device__ __forceinline__ void store_word(void *to, uint2 x) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(x.x),
               "r"(x.y)
               : "memory");
}
__device__ __forceinline__ void store_word(void *to, uint32_t x) {
  *static_cast<uint32_t *>(to) = x;
}
__device__ __forceinline__ void store_word(void *to, uint16_t x) {
  *static_cast<uint16_t *>(to) = x;
}

}  // namespace mmadapt
