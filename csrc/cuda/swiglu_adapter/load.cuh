// The two loading warps: what they ask of the TMA unit, in the order in which the warpgroups take it.
#pragma once

#include "../hopper/tma.cuh"
#include "ring.cuh"

namespace mmadapt::swiglu {

__device__ __forceinline__ void load_chunk(const Arguments &a, Ring &ring, int row, int column,
                                           uint64_t policy) {
  const Plan &p = a.plan;
  ring.wait_empty();
  barrier_expect(ring.full_barrier(), p.stage_bytes);
  tma_load(ring.data(), &a.input, ring.full_barrier(), column, row, policy);
  if (p.inputs == 2) {
    tma_load(ring.data() + p.input_bytes, &a.second, ring.full_barrier(), column, row, policy);
  }
  ring.advance();
}

// One thread. Chunks that will be read again should survive in L2 until then, the others need not.
__device__ __forceinline__ void load_inputs(const Arguments &a, uint32_t shared, const Tiles &tiles) {
  const Plan &p = a.plan;
  const int first = static_cast<int>(cluster_block()) * p.columns, kept = kept_chunks(p);
  const uint64_t again = evict_last(), once = evict_first();
  Ring ring = input_ring(p, shared);
  for (int n = 0; n < tiles.count; ++n) {
    const int row = tiles.index(n) * p.rows;
#pragma unroll 1
    for (int c = 0; c < p.chunks; ++c) {
      load_chunk(a, ring, row, first + c * kChunk, c < p.chunks - kept ? again : once);
    }
#pragma unroll 1
    for (int turn = kept; turn < p.chunks; ++turn) {
      load_chunk(a, ring, row, first + stage2_chunk(p, turn) * kChunk, once);
    }
  }
}

template <class S>
__device__ __forceinline__ void load_gate_down(const Arguments &a, Ring &ring, int expert, int column,
                                               uint64_t policy) {
  ring.wait_empty();
  barrier_expect(ring.full_barrier(), S::kGateDownBytes);
  tma_load(ring.data(), &a.gate, ring.full_barrier(), column, 0, expert, policy);
  tma_load(ring.data() + S::MP * 128, &a.down, ring.full_barrier(), column, 0, expert, policy);
  ring.advance();
}

template <class S>
__device__ __forceinline__ void load_up(const Arguments &a, Ring &ring, int expert, int column,
                                        uint64_t policy) {
  ring.wait_empty();
  barrier_expect(ring.full_barrier(), S::kUpBytes);
#pragma unroll
  for (int half = 0; half < S::kHalves; ++half) {
    tma_load(ring.data() + half * (64 * 128), &a.up, ring.full_barrier(), half * 64, column, expert,
             policy);
  }
  ring.advance();
}

// One warp, of which one lane loads.
template <class S>
__device__ __forceinline__ void load_weights(const Arguments &a, uint32_t shared, const Tiles &tiles) {
  const Plan &p = a.plan;
  const int first = static_cast<int>(cluster_block()) * p.columns;
  const bool loads = threadIdx.x % 32 == 0;
  const uint64_t policy = evict_last();
  Ring ring = weight_ring(p, shared, S::kGateDownBytes);
  for (int n = 0; n < tiles.count; ++n) {
    const Range r = tile_experts(a, tiles.index(n));
    if (!loads) continue;
    const Range ups = a.up_experts == 1 ? Range{0, 0} : r;
#pragma unroll 1
    for (int turn = 0; turn < 2 * p.chunks; ++turn) {
      const bool stage1 = turn < p.chunks;
      const int column = first + (stage1 ? turn : stage2_chunk(p, turn - p.chunks)) * kChunk;
      if (stage1 != S::BACKWARD) {
#pragma unroll 1
        for (int e = r.low; e <= r.high; ++e) load_gate_down<S>(a, ring, e, column, policy);
      } else {
#pragma unroll 1
        for (int e = ups.low; e <= ups.high; ++e) load_up<S>(a, ring, e, column, policy);
      }
    }
  }
}

}  // namespace mmadapt::swiglu
