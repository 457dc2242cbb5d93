// csrc/cuda/hopper/roles.cuh: registers are not counted, and a kernel ends before the next begins.
#pragma once

namespace mmadapt::hopper {

template <int N>
void fewer_registers() {}
template <int N>
void more_registers() {}
inline void wait_for_previous_kernel() {}

}  // namespace mmadapt::hopper
