// What swiglu_adapter.cpp (compiled once) and the kernels (compiled per instruction set) share.
#pragma once

#include "mmadapt/swiglu_adapter.h"

namespace mmadapt {

// Tokens sorted by expert, stably; those with expert -1 last.
struct Routing {
  const int64_t *rows;     // [tokens] position -> row of x; null = identity
  const int64_t *offsets;  // [experts + 2] positions where each expert starts; [experts]: expert -1
};

// Memory of one call, on a 64-byte boundary; null when there is none. A thread has one call at a time,
// and keeps its memory for the next: mapping a few megabytes anew costs 0.1 ms in page faults, as much
// as the arithmetic of 100 tokens.
float *acquire_scratch(int64_t bytes);
void release_scratch();

using Forward = mmadapt_status(const mmadapt_swiglu_adapter &, const Routing &,
                               const mmadapt_swiglu_adapter_outputs &);
using Backward = mmadapt_status(const mmadapt_swiglu_adapter &, const Routing &,
                                const mmadapt_swiglu_adapter_gradients &);

#define MMADAPT_DECLARE(isa) \
  Forward forward_##isa;     \
  Backward backward_##isa;
MMADAPT_DECLARE(generic)
MMADAPT_DECLARE(avx2)
MMADAPT_DECLARE(avx512)
#undef MMADAPT_DECLARE

}  // namespace mmadapt

#define MMADAPT_CONCAT_(a, b) a##_##b
#define MMADAPT_CONCAT(a, b) MMADAPT_CONCAT_(a, b)
// forward_avx512 and so on, in the source compiled with -DMMADAPT_ISA=avx512.
#define MMADAPT_KERNEL(name) MMADAPT_CONCAT(name, MMADAPT_ISA)
