// The factored linear layer on Hopper: the GEMM whose K continues over the ranks.
//
//   forward   y  = [x | core] [W | factor_out]^T + bias
//   backward  dx = [dy_1 | .. | dz] [W_1; ..; factor_in]            (W as it is stored: N-major)
//
// y is written once, by one accumulator; the low-rank term costs R more of K. Blocks are persistent; each
// works on tiles of 128 x COLUMNS, two on tiles below one another as a cluster:
//
//      memory/L2                     a block                                            memory
//        |      TMA        +------------------------+
//        +---------------> | x     [128, 64]        |  wgmma   +-----------------+        ^
//        |                 |                        | -------> | 2 warpgroups    |        |
//        |      TMA, half  | W     [COLUMNS, 64]    |          | [64, COLUMNS]   |        |
//        +-------------+-> |                        |          | sums each       |        |
//                      |   |   x stages             |          +-----------------+        |
//                      |   +------------------------+             | + bias, to 16 bit     |
//                      +-> the other block of the cluster,        v                       |
//                          which sends its half here       +---------------+     TMA      |
//                                                          | boxes 16 x 64 | -------------+
//   one thread loads, one warp fetches the bias            +---------------+
//
// The core comes from a kernel before this one (cp_linear_project_sm90.cu), or is made here first, for all
// weights of a group that share x, by tiles whose W is factor_in (RP > 0; cp_linear/gemm_project.cuh):
//
//      x, factor_in --> stages --> sums [64, RP] --> z, cores --> memory --> cores of tiles, once flags say so
//
// A stage is loaded again when the consumer warps of both blocks have released it, since its half of W goes
// to both. While tile n is stored, the stages of tile n + 1 fill. What each role does: cp_linear/gemm_roles.cuh.
//
// K is summed in one order, whatever the tile: reruns are bit-equal.

#pragma once

#include "../hopper/roles.cuh"
#include "gemm_project.cuh"

namespace mmadapt::cp_linear {

// No block leaves while another may still write into its shared memory.
__device__ __forceinline__ void leave_together() {
  __syncwarp();
  hopper::cluster_arrive();
  hopper::cluster_wait();
}

template <int COLUMNS, int RP>
inline constexpr uint32_t kSharedBytes = Layout<COLUMNS>::kBytes + (RP > 0 ? Mail::kBytes : 0);

// RP: ranks of z, padded to a product's columns; 0: the cores are given.
template <class T, int COLUMNS, Major MAJOR, int RP>
__global__ void __launch_bounds__(kThreads, 1) cp_linear_gemm_kernel(const __grid_constant__ Arguments a) {
  using L = Layout<COLUMNS>;
  static_assert(RP <= COLUMNS && kSharedBytes<COLUMNS, RP> <= uint32_t(kSharedLimit));
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t shared = hopper::local(memory);
  float *bias = reinterpret_cast<float *>(memory + L::kBias);
  const Barriers<COLUMNS> barriers = {shared + L::kBarriers};
  const Mail mail = {shared + L::kBytes};
  const int warp = hopper::uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    if constexpr (RP > 0) mail.init();
    barriers.init(a.cluster);
  }
  __syncwarp();
  hopper::cluster_arrive();
  hopper::cluster_wait();
  Tiles tiles = my_tiles(a);
  if (warp >= kConsumerWarps) {
    hopper::fewer_registers<40>();
    if (warp == kConsumerWarps) {
      Ring<L::kStages> ring;
      if (lane != 0) {
      } else if constexpr (RP > 0) {
        tiles.index = load_units<COLUMNS, RP>(a, barriers, mail, shared, tiles.rank, ring);
        load_tiles<COLUMNS, MAJOR>(a, barriers, shared, tiles, ring,
                                   [&](const Origin &at) { await_cores(a, at); });
      } else {
        bool waited = false;  // for the kernel before, from which the cores come
        load_tiles<COLUMNS, MAJOR>(a, barriers, shared, tiles, ring, [&](const Origin &) {
          if (!waited) hopper::wait_for_previous_kernel();
          waited = true;
        });
      }
    } else if (warp == kConsumerWarps + 1 && a.bias != nullptr) {
      if constexpr (RP > 0) {
        hopper::barrier_wait(mail.started(), 0);
        tiles.index = hopper::load_shared_word(mail.tile());
      }
      load_bias<T>(a, barriers, bias, tiles, lane);
    }
    leave_together();
  } else {
    hopper::more_registers<232>();
    const int group = warp / 4;
    const uint32_t left = hopper::gemm::first_box<Major::K>(shared + group * (64 * 128));
    const uint32_t right = hopper::gemm::first_box<MAJOR>(shared + L::kLeftBytes);
    const uint32_t boxes = shared + L::kStores + warp * 2 * kStoreBytes;
    const uint32_t peer = hopper::remote(barriers.empty(0), tiles.rank ^ (a.cluster - 1));
    const Release<COLUMNS> release = {barriers, peer, lane == 0, a.cluster == 2};
    Ring<L::kStages> ring;
    Ring<2> bias_ring;
    if constexpr (RP > 0) {
      tiles.index = make_cores<T, COLUMNS, RP>(a, barriers, mail, release, left, right, boxes, tiles.rank,
                                               warp, lane, ring);
    }
    for (int index = tiles.index; index < tiles.end; index += tiles.step) {
      const Origin at = origin<COLUMNS>(a, tiles, index);
      float d[COLUMNS / 2];
      multiply_tile<T, COLUMNS, MAJOR>(d, a, barriers, release, left, right, ring);
      const float *tile_bias = nullptr;
      if (a.bias != nullptr) {
        hopper::barrier_wait(barriers.bias_full(bias_ring.slot), bias_ring.parity);
        tile_bias = bias + bias_ring.slot * COLUMNS;
      }
      store_tile<T, COLUMNS>(d, a, tile_bias, boxes, at.row + warp * kStoreRows, at.column, lane);
      if (a.bias != nullptr) {
        hopper::barrier_arrive_if(lane == 0, barriers.bias_empty(bias_ring.slot));
        bias_ring.advance();
      }
    }
    if (lane == 0) hopper::tma_wait_read<0>();
    leave_together();
  }
}

}  // namespace mmadapt::cp_linear
