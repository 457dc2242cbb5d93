// SwiGLU adapter on Hopper: forward, and the gradient of x.
//
//   forward   z = rstd (x [gate; down]^T), h = silu(z_gate) z_down, y = base + scale (h up^T)
//   backward  dh = scale (dy up), dz from dh and the saved z, dx = base's + dz [gate; down]
//
// Both are two skinny products around a few operations on the rank, so one kernel does both. A cluster of C
// blocks owns a tile of 64 to 256 rows; each block has d/C of its columns, which pass through a ring of
// chunks of 64 columns. The weights of those columns pass through a second ring: each block reads 1/C of
// them a tile, which is what keeps the traffic between L2 and the SMs near that of a copy.
//
//   x (dy) --TMA--> ring --wgmma--> sums of all chunks, in registers                     stage 1
//   weights --TMA--> ring --^             | st.async through the cluster
//                                         v
//                    owner of 8 ranks: adds C parts, activation, saves z                 exchange
//                                         | st.async to all C blocks
//                                         v
//   x (dy) still in the ring, or again from L2 --> x + h W --in place--> TMA --> y (dx)  stage 2
//   weights --TMA--> ring --wgmma--^
//
// Four warpgroups compute, on 64 rows each or sharing them; four warps load. Stage 2 begins with the chunks that
// are still in shared memory and goes on backwards, so that L2 still holds what is read again. While a tile
// is in stage 2 the ring fills with the next.
//
// The sums over C and over d have a fixed order: reruns are bit-equal.
//
// tests/cuda/emulation runs this code on the CPU, under schedules and late transfers that a GPU rarely shows.
#pragma once

#include <cuda_runtime.h>

#include "../hopper/roles.cuh"
#include "../launch.cuh"
#include "../resident.cuh"
#include "exchange.cuh"
#include "load.cuh"

namespace mmadapt::swiglu {

__device__ __forceinline__ void init_barriers(const Plan &p, uint32_t shared, int releases) {
  const uint32_t first = shared + p.barriers;
  for (int i = 0; i < kMaxStages; ++i) {
    barrier_init(first + 8 * i, 1);                                      // chunk full
    barrier_init(first + 8 * (kMaxStages + i), releases);                // empty
    barrier_init(first + 8 * (2 * kMaxStages + i), 1);                   // weights full
    barrier_init(first + 8 * (3 * kMaxStages + i), releases);            // empty
  }
  for (int i = 0; i < 2 * kWarpgroups; ++i) barrier_init(first + 8 * (4 * kMaxStages + i), 1);
  barrier_init_fence();
  fence_async_proxy();
}

// The norm's weight of this block's columns as fp32.
template <class T>
__device__ __forceinline__ void load_norm(const Arguments &a, uint32_t shared) {
  const Plan &p = a.plan;
  for (int c = threadIdx.x; c < p.chunks * kChunk; c += kWarpgroups * 128) {
    const int column = chunk_column(p, c / kChunk) + c % kChunk;
    float weight = 0.0f;
    if (column < a.dim) {
      weight = a.norm_is_fp32 ? __ldg(static_cast<const float *>(a.norm_weight) + column)
                              : widen(__ldg(static_cast<const T *>(a.norm_weight) + column));
    }
    store_shared_word(shared + p.norm + c * 4, __float_as_uint(weight));
  }
}

template <class T, class S>
__device__ __forceinline__ void compute(const Arguments &a, uint32_t shared, const Tiles &tiles) {
  if (a.norm_weight != nullptr && a.residual == MMADAPT_RESIDUAL_NORM) {
    load_norm<T>(a, shared);
    named_barrier(8, kWarpgroups * 128);
  }
  const Plan &p = a.plan;
  Warpgroup<S> w = make_warpgroup<S>(shared);
  expect_first(a, w);
  Ring input = input_ring(p, shared, w.depth);
  Ring weights = weight_ring(p, shared, w.depth, S::kGateDownBytes);
  for (int n = 0; n < tiles.count; ++n) {
    const int tile = tiles.index(n);
    const Routing r = route(a, w, tile);
    {
      float sums[S::kProducts][S::kWidth1 / 2], row_sums[2];
      stage1<T>(sums, row_sums, a, w, r, input, weights);
      if (n == 0) cluster_wait();  // every block's barriers are there
      exchange<T>(sums, row_sums, a, w, r, tile);
    }
    stage2<T>(a, w, r, tile, input, weights);
  }
  if (tiles.count == 0) cluster_wait();
}

template <class T, class S>
__global__ void __launch_bounds__(kThreads, 1) adapter_kernel(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t shared = local(memory);
  const Tiles tiles = my_tiles(a);
  const int warp = uniform(threadIdx.x / 32);
  if (threadIdx.x == 0) init_barriers(a.plan, shared, S::kReleases);
  __syncthreads();
  cluster_arrive();
  if (warp < kWarpgroups * 4) {
    more_registers<kComputeRegisters>();
    compute<T, S>(a, shared, tiles);
  } else {
    fewer_registers<kLoadRegisters>();
    const int loader = warp - kWarpgroups * 4;
    if (loader >= 2) {
      load_weights<S>(a, shared, tiles, loader - 2);
    } else if (threadIdx.x % 32 == 0) {
      load_inputs<S>(a, shared, tiles, loader);
    }
    __syncwarp();
    cluster_wait();
  }
  __syncwarp();
  cluster_arrive();
  cluster_wait();  // no block leaves while another may still write into its shared memory
}

using Kernel = void (*)(Arguments);
constexpr char kName[] = "swiglu_adapter_kernel";

// The launch that seems fastest: its kernel, plan and clusters.
struct Choice {
  Kernel kernel = nullptr;
  Plan plan = {};
  int clusters = 0;
  int64_t cost = INT64_MAX;
};

// What a launch seems to take, in percent of a row of one chunk that passes a block. Fitted to what was
// measured: waves count; within one wave nothing overlaps with the next tile; clusters of four leave some
// multiprocessors idle; tiles of 256 rows keep the least of their rows in shared memory; where rows of a tile have
// several experts the slowest of few tiles counts in the forward. That a ring of one stage costs half as much
// again is a guess.
template <class S>
int64_t cost_of(const Plan &p, int64_t waves) {
  const int64_t percent = 100 + (waves == 1 ? 8 : 0) + (p.cluster > 2 ? 10 : 0) +
                          (p.rows == 256 ? 5 : 0) + (p.stages == 1 || p.weight_stages == 1 ? 50 : 0) +
                          (S::ROUTED && !S::BACKWARD && p.rows == 64 ? 12 : 0);
  return waves * (p.chunks * (percent * p.rows + 10 * S::MP) + 100 * 128);
}

template <class T, class S>
cudaError_t consider(Choice &best, const Arguments &a, int cluster, int rows) {
  if (rows != 0 && rows != S::kRows) return cudaSuccess;
  const Norm norm = a.norm_weight == nullptr ? Norm::kNone
                    : a.residual == MMADAPT_RESIDUAL_NORM ? Norm::kColumns : Norm::kRows;
  const Plan plan = make_plan<S>(a.dim, cluster, norm);
  if (plan.rows == 0) return cudaSuccess;
  const Kernel kernel = &adapter_kernel<T, S>;
  int clusters = 0;
  const cudaError_t error = resident_clusters(reinterpret_cast<const void *>(kernel), plan.cluster,
                                              kThreads, plan.bytes, kSharedLimit, &clusters);
  if (error != cudaSuccess || clusters < 1) return error;
  const int64_t tiles = (a.tokens + plan.rows - 1) / plan.rows;
  const int64_t waves = (tiles + clusters - 1) / clusters;
  const int64_t cost = cost_of<S>(plan, waves);
  if (cost < best.cost) best = {kernel, plan, static_cast<int>(tiles < clusters ? tiles : clusters), cost};
  return cudaSuccess;
}

}  // namespace mmadapt::swiglu
