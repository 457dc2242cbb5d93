// What the portable kernels take from sm_80 on: asynchronous copies into shared memory, and loads of
// matrix fragments. Addresses in shared memory are 32-bit (`shared_address`).
#pragma once

#include <cstdint>

namespace mmadapt::portable {

__device__ __forceinline__ uint32_t shared_address(const void *pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global memory, or zeros: nothing is read then.
__device__ __forceinline__ void copy_async(uint32_t to, const void *from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to),
               "l"(__cvta_generic_to_global(from)), "r"(inside ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void copies_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int kGroups>
__device__ __forceinline__ void copies_wait_for() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

constexpr int kMostGroups = 6;

// All but this thread's last `groups` groups of copies are done.
__device__ __forceinline__ void copies_wait(int groups) {
  switch (groups) {
    case 0: return copies_wait_for<0>();
    case 1: return copies_wait_for<1>();
    case 2: return copies_wait_for<2>();
    case 3: return copies_wait_for<3>();
    case 4: return copies_wait_for<4>();
    case 5: return copies_wait_for<5>();
    default: return copies_wait_for<kMostGroups>();
  }
}

// Four 8x8 matrices of 16-bit numbers; lane 8i + r names the address of row r of matrix i. Lane
// (g, q) = (lane / 4, lane % 4) gets of each the numbers 2q and 2q + 1 of row g.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

// The same of the transposed matrices.
__device__ __forceinline__ void load_transposed(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

__device__ __forceinline__ uint32_t load_shared(uint32_t at) {
  uint32_t word;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(at) : "memory");
  return word;
}

__device__ __forceinline__ uint4 load_shared_16(uint32_t at) {
  uint4 words;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "r"(at)
               : "memory");
  return words;
}

__device__ __forceinline__ void store_shared(uint32_t at, uint32_t word) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(word) : "memory");
}

}  // namespace mmadapt::portable
