// The loading warps: what they ask of the TMA unit, in the order in which the warpgroups take it.
#pragma once

#include "../hopper/roles.cuh"
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

// Two warps load rows, two weights, each for every second ring.
template <class S>
constexpr int kRings = (S::kDepths + 1) / 2;

// One thread. Chunks that will be read again should survive in L2 until then, the others need not.
template <class S>
__device__ __forceinline__ void load_inputs(const Arguments &a, uint32_t shared, const Tiles &tiles,
                                            int first) {
  if (first >= S::kDepths) return;
  const Plan &p = a.plan;
  const uint64_t again = evict_last(), once = evict_first();
  Ring rings[kRings<S>];
#pragma unroll
  for (int d = 0; d < kRings<S>; ++d) rings[d] = input_ring(p, shared, first + 2 * d);
  for (int n = 0; n < tiles.count; ++n) {
    const int row = tiles.index(n) * p.rows;
    const int most = (p.chunks + S::kDepths - 1) / S::kDepths;
#pragma unroll 1
    for (int i = 0; i < most; ++i) {
#pragma unroll
      for (int d = 0; d < kRings<S>; ++d) {
        const Chunks c = chunks_of(p, first + 2 * d, S::kDepths);
        if (i >= c.count) continue;
        load_chunk(a, rings[d], row, chunk_column(p, c.stage1(i)), i < c.leaving() ? again : once);
      }
    }
#pragma unroll 1
    for (int i = 0; i < most; ++i) {
#pragma unroll
      for (int d = 0; d < kRings<S>; ++d) {
        const Chunks c = chunks_of(p, first + 2 * d, S::kDepths);
        if (i < c.kept || i >= c.count) continue;
        load_chunk(a, rings[d], row, chunk_column(p, c.stage2(i)), once);
      }
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
  for (int panel = 0; panel < S::kPanels; ++panel) {
    tma_load(ring.data() + panel * (64 * 128), &a.up, ring.full_barrier(), panel * 64, column, expert,
             policy);
  }
  ring.advance();
}

// One warp, of which one lane loads.
template <class S>
__device__ __forceinline__ void load_weights(const Arguments &a, uint32_t shared, const Tiles &tiles,
                                             int first) {
  if (first >= S::kDepths) return;
  const Plan &p = a.plan;
  const bool loads = threadIdx.x % 32 == 0;
  const uint64_t policy = evict_last();
  if (loads) wait_for_previous_kernel();  // which may pack the weights; rows do not wait for it
  Ring rings[kRings<S>];
#pragma unroll
  for (int d = 0; d < kRings<S>; ++d) {
    rings[d] = weight_ring(p, shared, first + 2 * d, S::kGateDownBytes);
  }
  for (int n = 0; n < tiles.count; ++n) {
    const Range r = S::ROUTED ? tile_experts(a, tiles.index(n)) : Range{0};
    if (!loads) continue;
    const Range ups = a.up_experts == 1 ? Range{0} : r;
    const int most = (p.chunks + S::kDepths - 1) / S::kDepths;
#pragma unroll 1
    for (int i = 0; i < 2 * most; ++i) {
      const bool stage1 = i < most;
      const int turn = stage1 ? i : i - most;
#pragma unroll
      for (int d = 0; d < kRings<S>; ++d) {
        const Chunks c = chunks_of(p, first + 2 * d, S::kDepths);
        if (turn >= c.count) continue;
        const int column = chunk_column(p, stage1 ? c.stage1(turn) : c.stage2(turn));
        if (stage1 != S::BACKWARD) {
#pragma unroll 1
          for (int e = r.low(); e <= r.high(); ++e) load_gate_down<S>(a, rings[d], e, column, policy);
        } else {
#pragma unroll 1
          for (int e = ups.low(); e <= ups.high(); ++e) load_up<S>(a, rings[d], e, column, policy);
        }
      }
    }
  }
}

}  // namespace mmadapt::swiglu
