// csrc/cuda/store_word.cuh: plain stores.
#pragma once

#include "cuda_runtime.h"

namespace mmadapt {

template <class Word>
void store_word(void *to, Word x) { *static_cast<Word *>(to) = x; }

}  // namespace mmadapt
