// csrc/cuda/hopper/tma.cuh by calls into the machine. There is no cache to give hints to.
#pragma once

#include "barrier.cuh"

namespace mmadapt::hopper {

inline uint64_t evict_first() { return 0; }
inline uint64_t evict_last() { return 0; }

inline void tma_load(uint32_t to, const CUtensorMap *map, uint32_t barrier, int c0, int c1, uint64_t) {
  machine::tma_load(to, map, barrier, c0, c1, -1);
}
inline void tma_load(uint32_t to, const CUtensorMap *map, uint32_t barrier, int c0, int c1, int c2, uint64_t) {
  machine::tma_load(to, map, barrier, c0, c1, c2);
}
inline void tma_store(const CUtensorMap *map, uint32_t from, int c0, int c1, uint64_t) {
  machine::tma_store(map, from, c0, c1);
}
inline void tma_commit() { machine::tma_commit(); }
template <int N>
void tma_wait_read() { machine::tma_wait_read(N); }

}  // namespace mmadapt::hopper
