// csrc/cuda/hopper/barrier.cuh by calls into the machine.
#pragma once

#include "cuda_runtime.h"

namespace mmadapt::hopper {

// A kernel has one array in shared memory, at the beginning of the window.
inline uint32_t local(const void *) { return machine::kWindow; }
inline uint32_t cluster_block() { return machine::block_in_cluster(); }
inline int lane_id() { return machine::lane(); }
inline uint32_t remote(uint32_t address, uint32_t block) { return address | (block + 1) << machine::kPeerShift; }

inline void barrier_init(uint32_t barrier, uint32_t arrivals) { machine::barrier_init(barrier, arrivals); }
inline void barrier_init_fence() {}
inline void barrier_arrive(uint32_t barrier) { machine::barrier_arrive(barrier, 1, 0); }
inline void barrier_arrive(uint32_t barrier, uint32_t arrivals) { machine::barrier_arrive(barrier, arrivals, 0); }
inline void barrier_expect(uint32_t barrier, uint32_t bytes) { machine::barrier_arrive(barrier, 1, bytes); }
inline void barrier_wait(uint32_t barrier, uint32_t parity) { machine::barrier_wait(barrier, parity); }
inline void fence_async_proxy() { machine::fence_async_proxy(); }
inline void named_barrier(uint32_t id, uint32_t threads) { machine::named_barrier(id, threads); }
inline void cluster_arrive() { machine::cluster_arrive(); }
inline void cluster_wait() { machine::cluster_wait(); }
inline void store_async(uint32_t to, float4 v, uint32_t barrier) { machine::store_async(to, &v, 16, barrier); }
inline void store_async(uint32_t to, uint2 v, uint32_t barrier) { machine::store_async(to, &v, 8, barrier); }

}  // namespace mmadapt::hopper
