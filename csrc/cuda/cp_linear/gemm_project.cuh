// z = x factor_in^T and the cores as work of the GEMM's own blocks, done before their first tile.
//
//   unit     z and the cores of a cluster's rows (128 a block): a tile whose `right` is factor_in
//   parcel   the units that one cluster does, of all of which there are fewer than clusters where z hides
//            (plan_fused)
//
// Clusters take numbers from a counter. Below the number of parcels it stands for a parcel, after which the
// cluster takes another one; what lies beyond says which tiles are the cluster's. So those that had a parcel
// come last to the tiles, and where tiles do not divide evenly the last ones have one tile less.
//
//   counter     block 0's loader       block 1's loader         consumers of each block
//      |  next         |    mailbox           |
//      +-------------> | -------------------> |     a stage without data
//                      +----------------------+-----------------------> "unit u", or "tiles from n on"
//                      |   x, factor_in       |     stages
//                      +----------------------+-----------------------> sums -> z, cores -> flag of 128 rows
//
// The loader of a tile awaits the flag of its rows before it asks for their cores, at the end of the tile's K.
//
// Nobody waits for ever, whichever clusters run, in which order, and whatever else holds the GPU (another such
// kernel too): every parcel's number was handed to a cluster that was running, which does it without waiting
// for any other cluster; and a cluster comes to its tiles, where it may wait, only with a number beyond the
// parcels, when all of those have been handed out. Nothing waits for a tile.
#pragma once

#include "../hopper/flag.cuh"
#include "cores.cuh"
#include "gemm_roles.cuh"

namespace mmadapt::cp_linear {

// Behind the layout of the GEMM: what blocks and warps tell one another.
struct Mail {
  static constexpr uint32_t kBytes = 64;
  uint32_t first;
  __device__ __forceinline__ uint32_t full() const { return first; }  // of block 1's mailbox
  __device__ __forceinline__ uint32_t empty() const { return first + 8; }  // the same, held by block 0
  __device__ __forceinline__ uint32_t started() const { return first + 16; }  // tile() is known
  __device__ __forceinline__ uint32_t number() const { return first + 24; }   // 8 bytes
  __device__ __forceinline__ uint32_t tile() const { return first + 32; }
  __device__ __forceinline__ uint32_t said(int slot) const { return first + 36 + 4 * slot; }

  // Before the other barriers, whose init() fences.
  __device__ __forceinline__ void init() const {
    for (const uint32_t barrier : {full(), empty(), started()}) hopper::barrier_init(barrier, 1);
  }
};
static_assert(36 + 4 * stages(128) <= Mail::kBytes && 36 + 4 * stages(256) <= Mail::kBytes);

// The next number of a cluster, in each of its blocks. One thread of each.
__device__ __forceinline__ int take_number(const Arguments &a, const Mail &mail, int rank,
                                           uint32_t &parity) {
  int number;
  if (rank == 0) {
    number = static_cast<int>(atomicAdd(a.projection.counter, 1u));
    if (a.cluster == 2) {
      hopper::barrier_wait(mail.empty(), parity ^ 1);
      hopper::store_async(hopper::remote(mail.number(), 1), uint2{static_cast<uint32_t>(number), 0u},
                          hopper::remote(mail.full(), 1));
    }
  } else {
    hopper::barrier_expect(mail.full(), 8);
    hopper::barrier_wait(mail.full(), parity);
    number = static_cast<int>(hopper::load_shared_words2(mail.number()).x);
    hopper::barrier_arrive_remote_if(true, hopper::remote(mail.empty(), 0));
  }
  parity ^= 1;
  return number;
}

// The loader's side of a stage without data.
template <int COLUMNS>
__device__ __forceinline__ void say(const Barriers<COLUMNS> &barriers, const Mail &mail, int word,
                                    Ring<stages(COLUMNS)> &ring) {
  hopper::barrier_wait(barriers.empty(ring.slot), ring.parity ^ 1);
  hopper::store_shared_word(mail.said(ring.slot), word);
  hopper::barrier_arrive(barriers.full(ring.slot));
  ring.advance();
}

// One thread. Loads this cluster's units and returns its first tile.
template <int COLUMNS, int RP>
__device__ __forceinline__ int load_units(const Arguments &a, const Barriers<COLUMNS> &barriers,
                                          const Mail &mail, uint32_t shared, int rank,
                                          Ring<stages(COLUMNS)> &ring) {
  const Projection &p = a.projection;
  hopper::tma_prefetch(&p.segment.left);
  hopper::tma_prefetch(&p.segment.right);
  hopper::wait_for_previous_kernel();  // it sets counter and flags to 0
  uint32_t parity = 0;
  for (;;) {
    const int number = take_number(a, mail, rank, parity), tile = number - p.parcels;
    if (tile >= 0) {
      say<COLUMNS>(barriers, mail, ~tile, ring);
      hopper::store_shared_word(mail.tile(), tile);
      hopper::barrier_arrive(mail.started());
      return tile;
    }
    for (int unit = number; unit < cluster_rows(a); unit += p.parcels) {
      say<COLUMNS>(barriers, mail, unit, ring);
      const Origin at = {(unit * a.cluster + rank) * kRows, 0};
      for (int c = 0; c < a.chunks; ++c) {
        hopper::barrier_wait(barriers.empty(ring.slot), ring.parity ^ 1);
        load_chunk<RP, Major::K>(a, p.segment, at, c * kChunk, rank,
                                 shared + ring.slot * Layout<COLUMNS>::kStageBytes,
                                 barriers.full(ring.slot));
        ring.advance();
      }
    }
  }
}

// Before the loads of the cores of a tile.
__device__ __forceinline__ void await_cores(const Arguments &a, const Origin &at) {
  hopper::await_flag(a.projection.done + at.row / kRows);
  hopper::fence_async_proxy_global();
}

// A warp's 16 rows of z and the cores, 64 ranks at a time through its two boxes: [16][64] in fp32, the units of
// 8 ranks of a row swizzled so that neither side's accesses meet in a bank.
template <class T, int RP>
__device__ __forceinline__ void store_cores(const float (&d)[RP / 2], const Cores &cores, uint32_t boxes,
                                            int row, int lane) {
  const auto place = [&](int local, int unit) { return boxes + local * 256 + ((unit ^ (local & 7)) << 5); };
  if (lane == 0) hopper::tma_wait_read<0>();
#pragma unroll
  for (int part = 0; part < RP / 64; ++part) {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int j = i / 2, local = lane / 4 + 8 * (i % 2), at = 32 * part + 2 * i;
      hopper::store_shared2(place(local, j) + 8 * (lane % 4), {d[at], d[at + 1]});
    }
    __syncwarp();
    for (int i = lane; i < kStoreRows * 8; i += 32) {
      const int local = i / 8, unit = i % 8;
      const Item item = make_item(cores, row, local, 8 * part + unit);
      if (!exists(cores, item)) continue;
      const uint32_t from = place(local, unit);
      const float4 low = hopper::load_shared4(from), high = hopper::load_shared4(from + 16);
      const float z[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      store_row<T>(cores.z, item.at, z);
      for (int k = 0; k < cores.count; ++k) scaled_core<T>(cores, k, item, z);
    }
  }
  __syncwarp();
}

// All consumer warps. Works off this cluster's units and returns its first tile.
template <class T, int COLUMNS, int RP>
__device__ __forceinline__ int make_cores(const Arguments &a, const Barriers<COLUMNS> &barriers,
                                          const Mail &mail, const Release<COLUMNS> &release, uint32_t left,
                                          uint32_t right, uint32_t boxes, int rank, int warp, int lane,
                                          Ring<stages(COLUMNS)> &ring) {
  for (;;) {
    hopper::barrier_wait(barriers.full(ring.slot), ring.parity);
    const int said = hopper::uniform(static_cast<int>(hopper::load_shared_word(mail.said(ring.slot))));
    release(ring.slot);
    ring.advance();
    if (said < 0) return ~said;
    const int panel = said * a.cluster + rank;
    float d[RP / 2];
    int before = 0;
    multiply_chunks<T, RP, COLUMNS, Major::K>(d, a.chunks, before, barriers, release, left, right, ring);
    hopper::wgmma_wait<0>();
    hopper::wgmma_pin(d);
    release(before);
    store_cores<T, RP>(d, a.projection.cores, boxes, panel * kRows + warp * kStoreRows, lane);
    hopper::fence_async_proxy_global();
    hopper::fence_gpu();
    hopper::named_barrier(1, kConsumerWarps * 32);
    if (warp == 0 && lane == 0) hopper::raise_flag(a.projection.done + panel);
    __syncwarp();
  }
}

}  // namespace mmadapt::cp_linear
