// What the warps of a block do in the GEMM of the factored linear layer: load chunks, load the bias,
// multiply and store. Device functions of the kernel in gemm_kernel.cuh; the data flow is drawn there.
#pragma once

#include "../hopper/fragment.cuh"
#include "../hopper/roles.cuh"
#include "../hopper/tma.cuh"
#include "../hopper/wgmma_gemm.cuh"
#include "gemm_tiles.h"

namespace mmadapt::cp_linear {

using hopper::gemm::Major;

template <int COLUMNS>
struct Barriers {
  static constexpr int kStages = stages(COLUMNS);
  uint32_t first;
  __device__ __forceinline__ uint32_t full(int slot) const { return first + 8 * slot; }
  __device__ __forceinline__ uint32_t empty(int slot) const { return first + 8 * (kStages + slot); }
  __device__ __forceinline__ uint32_t bias_full(int buffer) const {
    return first + 8 * (2 * kStages + buffer);
  }
  __device__ __forceinline__ uint32_t bias_empty(int buffer) const {
    return first + 8 * (2 * kStages + 2 + buffer);
  }

  // `empty` waits for the consumers of every block of the cluster: a load writes into all of them.
  __device__ __forceinline__ void init(int cluster) const {
    for (int i = 0; i < kStages; ++i) {
      hopper::barrier_init(full(i), 1);
      hopper::barrier_init(empty(i), kConsumerWarps * cluster);
    }
    for (int i = 0; i < 2; ++i) {
      hopper::barrier_init(bias_full(i), 32);
      hopper::barrier_init(bias_empty(i), kConsumerWarps);
    }
    hopper::barrier_init_fence();
    hopper::fence_async_proxy();
  }
};

// A place in a ring of N, and the parity of its barriers' phase.
template <int N>
struct Ring {
  int slot = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++slot == N) slot = 0, parity ^= 1;
  }
};

// The tiles of this block: those of its cluster, of which it takes the rows of its rank.
struct Tiles {
  int index, step, end, rank;
};
__device__ __forceinline__ int cluster_rows(const Arguments &a) {
  return (a.row_tiles + a.cluster - 1) / a.cluster;
}
__device__ __forceinline__ Tiles my_tiles(const Arguments &a) {
  return {int(blockIdx.x) / a.cluster, int(gridDim.x) / a.cluster, cluster_rows(a) * a.column_tiles,
          int(hopper::cluster_block())};
}

// Where a tile begins in y.
struct Origin {
  int row, column;
};
template <int COLUMNS>
__device__ __forceinline__ Origin origin(const Arguments &a, const Tiles &tiles, int index) {
  const Place p = place(index, cluster_rows(a), a.column_tiles, a.group);
  return {(p.row * a.cluster + tiles.rank) * kRows, p.column * COLUMNS};
}

// Chunk `k` (its first column) of one segment into a stage. The blocks of a cluster have the same columns
// of y: each loads its part of `right` for both, K-major half of the rows, N-major half of the k.
template <int COLUMNS, Major MAJOR>
__device__ __forceinline__ void load_chunk(const Arguments &a, const Segment &s, const Origin &at, int k,
                                           int rank, uint32_t stage, uint32_t full) {
  using L = Layout<COLUMNS>;
  hopper::barrier_expect(full, L::kStageBytes);
  hopper::tma_load(stage, &s.left, full, k, at.row);
  const uint32_t right = stage + L::kLeftBytes;
  if constexpr (MAJOR == Major::K) {
    if (a.cluster == 1) {
      hopper::tma_load(right, &s.right, full, k, at.column);
    } else {
      const int skipped = rank * (COLUMNS / 2);
      hopper::tma_load_multicast(right + skipped * 128, &s.right, full, 3, k, at.column + skipped);
    }
  } else {
    const int skipped = rank * (kChunk / 2);
#pragma unroll
    for (int j = 0; j < COLUMNS / 64; ++j) {
      const uint32_t box = right + j * (kChunk * 128);
      if (a.cluster == 1) {
        hopper::tma_load(box, &s.right, full, at.column + 64 * j, k);
      } else {
        hopper::tma_load_multicast(box + skipped * 128, &s.right, full, 3, at.column + 64 * j,
                                   k + skipped);
      }
    }
  }
}

// One thread. Before the cores of a tile are asked for, await(where the tile begins) is called.
template <int COLUMNS, Major MAJOR, class Await>
__device__ __forceinline__ void load_tiles(const Arguments &a, const Barriers<COLUMNS> &barriers,
                                           uint32_t shared, const Tiles &tiles,
                                           Ring<stages(COLUMNS)> &ring, Await await) {
  hopper::tma_prefetch(&a.segments[0].left);
  hopper::tma_prefetch(&a.segments[0].right);
  hopper::tma_prefetch(&a.y);
  for (int index = tiles.index; index < tiles.end; index += tiles.step) {
    const Origin at = origin<COLUMNS>(a, tiles, index);
    const int segments = a.count + (a.rank_chunks > 0);
    for (int s = 0; s < segments; ++s) {
      const int chunks = s < a.count ? a.chunks : a.rank_chunks;
      if (s == a.count) await(at);
      for (int c = 0; c < chunks; ++c) {
        hopper::barrier_wait(barriers.empty(ring.slot), ring.parity ^ 1);
        load_chunk<COLUMNS, MAJOR>(a, a.segments[s], at, c * kChunk, tiles.rank,
                                   shared + ring.slot * Layout<COLUMNS>::kStageBytes,
                                   barriers.full(ring.slot));
        ring.advance();
      }
    }
  }
}

// One warp. The next tile's bias waits in shared memory, as fp32, while this tile is multiplied.
template <class T, int COLUMNS>
__device__ __forceinline__ void load_bias(const Arguments &a, const Barriers<COLUMNS> &barriers,
                                          float *bias, const Tiles &tiles, int lane) {
  Ring<2> ring;
  for (int index = tiles.index; index < tiles.end; index += tiles.step) {
    const int column = origin<COLUMNS>(a, tiles, index).column;
    hopper::barrier_wait(barriers.bias_empty(ring.slot), ring.parity ^ 1);
    for (int i = lane; i < COLUMNS; i += 32) {
      float value = 0.0f;
      if (column + i < a.columns) {
        value = a.bias_is_fp32 ? __ldg(static_cast<const float *>(a.bias) + column + i)
                               : hopper::widen(static_cast<const T *>(a.bias)[column + i]);
      }
      bias[ring.slot * COLUMNS + i] = value;
    }
    hopper::barrier_arrive(barriers.bias_full(ring.slot));
    ring.advance();
  }
}

// The consumers' side of a ring slot: this warp is done with it, in every block that loads into it.
template <int COLUMNS>
struct Release {
  Barriers<COLUMNS> barriers;
  uint32_t peer;  // empty(0) of the other block; unused without one
  bool first_lane, paired;
  __device__ __forceinline__ void operator()(int slot) const {
    hopper::barrier_arrive_if(first_lane, barriers.empty(slot));
    hopper::barrier_arrive_remote_if(first_lane && paired, peer + 8 * slot);
  }
};

// Adds whole chunks to a warpgroup's sums [64, WIDTH], the first of them to nothing. One chunk's products run
// while the next one's loads are waited for; those of `before`, the last slot, are still under way at the end.
template <class T, int WIDTH, int COLUMNS, Major MAJOR>
__device__ __forceinline__ void multiply_chunks(float (&d)[WIDTH / 2], int chunks, int &before,
                                                const Barriers<COLUMNS> &barriers,
                                                const Release<COLUMNS> &release, uint32_t left,
                                                uint32_t right, Ring<stages(COLUMNS)> &ring) {
  namespace wg = hopper::gemm;
  constexpr uint32_t kStage = Layout<COLUMNS>::kStageBytes >> 4;  // as descriptors count
  for (int c = 0; c < chunks; ++c) {
    hopper::barrier_wait(barriers.full(ring.slot), ring.parity);
    const uint32_t l = left + ring.slot * kStage, r = right + ring.slot * kStage;
    hopper::wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      wg::multiply<T, MAJOR>(d, l + k * wg::kStep<Major::K>, r + k * wg::kStep<MAJOR>, c + k);
    }
    hopper::wgmma_commit();
    hopper::wgmma_wait<1>();
    if (c > 0) release(before);
    before = ring.slot;
    ring.advance();
  }
}

// The sums of a warpgroup's 64 rows over all of K.
template <class T, int COLUMNS, Major MAJOR>
__device__ __forceinline__ void multiply_tile(float (&d)[COLUMNS / 2], const Arguments &a,
                                              const Barriers<COLUMNS> &barriers,
                                              const Release<COLUMNS> &release, uint32_t left,
                                              uint32_t right, Ring<stages(COLUMNS)> &ring) {
  namespace wg = hopper::gemm;
  constexpr uint32_t kStage = Layout<COLUMNS>::kStageBytes >> 4;
  const int total = a.count * a.chunks + a.rank_chunks, whole = total - (a.last_steps < 4);
  int before = 0;
  multiply_chunks<T, COLUMNS, COLUMNS, MAJOR>(d, whole, before, barriers, release, left, right, ring);
  if (whole < total) {  // the rest of the ranks
    hopper::barrier_wait(barriers.full(ring.slot), ring.parity);
    const uint32_t l = left + ring.slot * kStage, r = right + ring.slot * kStage;
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      if (k < a.last_steps) {
        hopper::wgmma_fence();
        wg::multiply<T, MAJOR>(d, l + k * wg::kStep<Major::K>, r + k * wg::kStep<MAJOR>, 1);
        hopper::wgmma_commit();
      }
    }
    hopper::wgmma_wait<1>();  // at least what used the slot before
    release(before);
    before = ring.slot;
    ring.advance();
  }
  hopper::wgmma_wait<0>();
  hopper::wgmma_pin(d);
  release(before);
}

// A warp's 16 rows, 64 columns at a time through two boxes in shared memory; the last two stores are still
// under way when the next tile begins.
template <class T, int COLUMNS>
__device__ __forceinline__ void store_tile(const float (&d)[COLUMNS / 2], const Arguments &a,
                                           const float *bias, uint32_t boxes, int row, int column,
                                           int lane) {
#pragma unroll
  for (int b = 0; b < COLUMNS / 64; ++b) {
    const uint32_t box = boxes + b % 2 * kStoreBytes;
    if (lane == 0) hopper::tma_wait_read<1>();
    __syncwarp();
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {  // of 8 columns each: blocks above and below, left then right
      const int j = 8 * b + 2 * pair;
      float2 left = {0.0f, 0.0f}, right = {0.0f, 0.0f};
      if (bias != nullptr) {
        left = *reinterpret_cast<const float2 *>(bias + 8 * j + 2 * (lane % 4));
        right = *reinterpret_cast<const float2 *>(bias + 8 * j + 8 + 2 * (lane % 4));
      }
      const uint32_t r[4] = {hopper::pack<T>(d[4 * j] + left.x, d[4 * j + 1] + left.y),
                             hopper::pack<T>(d[4 * j + 2] + left.x, d[4 * j + 3] + left.y),
                             hopper::pack<T>(d[4 * j + 4] + right.x, d[4 * j + 5] + right.y),
                             hopper::pack<T>(d[4 * j + 6] + right.x, d[4 * j + 7] + right.y)};
      const uint32_t at = lane % 16, unit = 2 * pair + lane / 16;
      hopper::store_blocks(box + at * 128 + ((unit ^ (at & 7)) << 4), r);
    }
    hopper::fence_async_proxy();
    __syncwarp();
    if (lane == 0) {
      hopper::tma_store(&a.y, box, column + 64 * b, row);
      hopper::tma_commit();
    }
  }
  __syncwarp();
}

}  // namespace mmadapt::cp_linear
