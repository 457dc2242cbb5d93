// csrc/cuda/hopper/fragment.cuh by calls into the machine.
#pragma once

#include "pairs.cuh"

namespace mmadapt::hopper {

inline void load_blocks(uint32_t (&r)[4], uint32_t address) { machine::load_blocks(r, address); }
inline void store_blocks(uint32_t address, const uint32_t (&r)[4]) { machine::store_blocks(address, r); }

template <class V>
V &shared_at(uint32_t address) { return *reinterpret_cast<V *>(machine::shared(address, sizeof(V))); }

inline float4 load_shared4(uint32_t address) { return shared_at<float4>(address); }
inline float2 load_shared2(uint32_t address) { return shared_at<float2>(address); }
inline uint2 load_shared_words2(uint32_t address) { return shared_at<uint2>(address); }
inline uint4 load_shared_words4(uint32_t address) { return shared_at<uint4>(address); }
inline void store_shared_word(uint32_t address, uint32_t v) { shared_at<uint32_t>(address) = v; }

}  // namespace mmadapt::hopper
