// csrc/cuda/hopper/wgmma_common.cuh by calls into the machine.
#pragma once

#include "wgmma_operands.cuh"

namespace mmadapt::hopper {

inline void wgmma_fence() {}
inline void wgmma_commit() { machine::product_commit(); }
template <int N>
void wgmma_wait() { machine::product_wait(N); }
template <int N>
void wgmma_pin(float (&)[N]) {}

}  // namespace mmadapt::hopper
