// csrc/cuda/hopper/wgmma.cuh by calls into the machine.
#pragma once

#include "wgmma_common.cuh"

namespace mmadapt::hopper {

template <class T, int N, int ROW_BYTES, int TRANSPOSED>
void wgmma(float (&d)[N / 2], uint32_t a, uint32_t b) {
  machine::product({d, N, !is_bf16<T>, TRANSPOSED != 0, false, {}, a, b, high_word(ROW_BYTES)});
}
template <class T, int N, int ROW_BYTES, int TRANSPOSED>
void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint32_t b) {
  machine::product({d, N, !is_bf16<T>, TRANSPOSED != 0, true, {a[0], a[1], a[2], a[3]}, 0, b, high_word(ROW_BYTES)});
}

}  // namespace mmadapt::hopper
