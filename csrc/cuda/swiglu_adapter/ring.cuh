// Rings of stages in shared memory, filled by TMA; and who needs which expert's weights.
#pragma once

#include "../hopper/barrier.cuh"
#include "../hopper/wgmma_common.cuh"
#include "arguments.h"

namespace mmadapt::swiglu {

using namespace mmadapt::hopper;

// One end of a ring: the stage in turn. `full` completes when a stage has been filled, `empty` when
// everybody has released it.
struct Ring {
  uint32_t first, bytes, full;  // address of stage 0, its size, address of its barrier
  int stages, stage;
  uint32_t parity;

  __device__ __forceinline__ uint32_t data() const { return first + stage * bytes; }
  __device__ __forceinline__ uint32_t full_barrier() const { return full + 8 * stage; }
  __device__ __forceinline__ uint32_t empty_barrier() const { return full_barrier() + 8 * kMaxStages; }
  __device__ __forceinline__ void wait_full() const { barrier_wait(full_barrier(), parity); }
  // The first round finds every stage empty.
  __device__ __forceinline__ void wait_empty() const { barrier_wait(empty_barrier(), parity ^ 1); }
  __device__ __forceinline__ void advance() {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

// The rings of the warpgroups that have every kDepths-th chunk, from chunk `depth` on.
__device__ __forceinline__ Ring input_ring(const Plan &p, uint32_t shared, int depth) {
  const uint32_t full = shared + p.barriers + 8 * depth * p.stages;
  return {shared + depth * p.stages * p.stage_bytes, p.stage_bytes, full, p.stages, 0, 0};
}
__device__ __forceinline__ Ring weight_ring(const Plan &p, uint32_t shared, int depth, uint32_t bytes) {
  const uint32_t full = shared + p.barriers + 16 * kMaxStages + 8 * depth * p.weight_stages;
  return {shared + p.weights + depth * p.weight_stages * bytes, bytes, full, p.weight_stages, 0,
          0};
}

// The tiles of this cluster: every `step`-th.
struct Tiles {
  int first, step, count;
  __device__ __forceinline__ int index(int n) const { return first + n * step; }
};

__device__ __forceinline__ Tiles my_tiles(const Arguments &a) {
  const int all = static_cast<int>((a.tokens + a.plan.rows - 1) / a.plan.rows);
  const int cluster = blockIdx.x / a.plan.cluster, clusters = gridDim.x / a.plan.cluster;
  return {cluster, clusters, cluster < all ? (all - cluster + clusters - 1) / clusters : 0};
}

// A block's chunks of columns that go through one ring, and their order. They stay in the ring from stage 1
// to stage 2 as far as they fit: the last `kept`. Stage 2 takes those first and then the others backwards,
// most recently used first.
struct Chunks {
  int depth, depths;
  int count, kept;
  // Chunk of the block that is the n-th of stage 1, the n-th of stage 2.
  __device__ __forceinline__ int stage1(int n) const { return n * depths + depth; }
  __device__ __forceinline__ int stage2(int n) const {
    return (n < kept ? count - kept + n : count - 1 - n) * depths + depth;
  }
  __device__ __forceinline__ int leaving() const { return count - kept; }
};

__device__ __forceinline__ Chunks chunks_of(const Plan &p, int depth, int depths) {
  const int count = (p.chunks - depth + depths - 1) / depths;
  return {depth, depths, count, min(count, p.stages)};
}

// First column of d of this block's chunk c.
__device__ __forceinline__ int chunk_column(const Plan &p, int c) {
  return (c * p.cluster + static_cast<int>(cluster_block())) * kChunk;
}

// Least and greatest expert of some rows, in one register.
struct Range {
  uint32_t ends;
  __device__ __forceinline__ int low() const { return ends & 0xFFFF; }
  __device__ __forceinline__ int high() const { return ends >> 16; }
};

// Among rows [first, first + 32 * words), -1 left out; 0 and 0 if there is none.
__device__ __forceinline__ Range experts_of(const Arguments &a, int64_t first, int words) {
  int low = kMaxExperts, high = -1;
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < words; ++i) {
    const int64_t row = first + i * 32 + lane;
    const int id = row < a.tokens ? __ldg(a.expert + row) : -1;
    if (id >= 0 && id < a.experts) low = min(low, id), high = max(high, id);
  }
  low = __reduce_min_sync(0xFFFFFFFFu, low);
  high = __reduce_max_sync(0xFFFFFFFFu, high);
  return {static_cast<uint32_t>(uniform(high < 0 ? 0 : low | high << 16))};
}

// What the tile's weights are loaded for. All warps of all blocks of the cluster find the same.
__device__ __forceinline__ Range tile_experts(const Arguments &a, int tile) {
  if (a.expert == nullptr) return {0};
  return experts_of(a, int64_t(tile) * a.plan.rows, a.plan.rows / 32);
}

}  // namespace mmadapt::swiglu
