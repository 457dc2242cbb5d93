// What one block does: a loading warp fills a ring of stages, two warpgroups multiply, all sums are stored
// at the end. Device functions of the kernel in swiglu_weights_sm90.cu, where the data flow is drawn.
#pragma once

#include "../hopper/fragment.cuh"
#include "../hopper/tma.cuh"
#include "../hopper/wgmma_rows.cuh"
#include "arguments.h"
#include "plan.h"

namespace mmadapt::swiglu_weights {

using namespace hopper;

constexpr uint32_t kEveryToken = 0xFFFFFFFFu;
constexpr int kBatch = 16;  // tiles whose ids the loading warp asks for at once: more than a ring holds

// The stages lie at the start of shared memory, what controls them behind.
struct Ring {
  uint32_t stages, control, stage_bytes;
  int count;
  __device__ __forceinline__ uint32_t stage(int i) const { return stages + i * stage_bytes; }
  __device__ __forceinline__ uint32_t full(int i) const { return control + 8 * i; }
  __device__ __forceinline__ uint32_t empty(int i) const { return control + 8 * (kMaxStages + i); }
  // Bit t: token t of the tile counts. 0: there are no more tiles.
  __device__ __forceinline__ uint32_t counted(int i) const {
    return control + 16 * kMaxStages + 4 * i;
  }
};

template <class R>
__device__ __forceinline__ Ring make_ring(uint32_t shared) {
  return {shared, shared + kSharedBytes, R::kStageBytes, R::kStages};
}

// Which stage comes next, and the parity of its barriers.
struct Slot {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance(int stages) {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

// This block's share: some columns, and every splits-th tile. The last tokens come first: the kernel that
// ran before has just read them, or written them.
struct Share {
  int column, split, splits, tiles;
  __device__ __forceinline__ int count() const { return (tiles - split + splits - 1) / splits; }
  __device__ __forceinline__ int token(int n) const {
    return (tiles - 1 - split - n * splits) * kTokens;
  }
};

// Boxes of `columns` columns from `first` on that hold any of the `total`; the others stay as they are, as
// nobody reads what is made of them.
__device__ __forceinline__ int boxes_inside(int total, int first, int columns, int most) {
  const int inside = (total - first + columns - 1) / columns;
  return inside < most ? inside : most;
}

template <class R>
__device__ __forceinline__ void load_tile(const Arguments &a, const Ring &ring, const Slot &slot,
                                          int column, int token, uint64_t policy) {
  const CUtensorMap *wide = R::kPair ? &a.x : &a.dy;
  const int narrow_columns = R::kPair ? a.pair_columns : a.up_columns;
  const int chunks = boxes_inside(a.dim, column, kChunk, R::kColumns / kChunk);
  const int boxes = boxes_inside(narrow_columns, 0, R::kBox, R::kBoxes);
  const uint32_t stage = ring.stage(slot.stage), barrier = ring.full(slot.stage);
  barrier_expect(barrier, chunks * kChunkBytes + boxes * R::kBoxBytes * (R::kPair ? 2 : 1));
  for (int i = 0; i < chunks; ++i) {
    tma_load(stage + i * kChunkBytes, wide, barrier, column + i * kChunk, token, policy);
  }
  const uint32_t narrow = stage + R::kWideBytes;
  for (int i = 0; i < boxes; ++i) {
    tma_load(narrow + i * R::kBoxBytes, R::kPair ? &a.gate : &a.h, barrier, i * R::kBox, token);
    if (R::kPair) {
      tma_load(narrow + (R::kBoxes + i) * R::kBoxBytes, &a.down, barrier, i * R::kBox, token);
    }
  }
}

// Which tokens count of kBatch tiles: those with an expert. Without experts all do: what lies past the last
// token reads as zero, whatever is said of it.
struct Routed {
  int32_t expert[kBatch] = {};  // of this lane's token of each tile; not looked at before `masks`

  __device__ __forceinline__ void ask(const Arguments &a, const Share &share, int first, int count,
                                      int lane) {
    const int last = static_cast<int>(a.tokens) - 1;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int at = share.token(min(first + i, count - 1)) + lane;
      if (a.expert != nullptr) expert[i] = __ldg(a.expert + min(at, last));
    }
  }

  // Lane i has the mask of tile i; bit t is token t.
  __device__ __forceinline__ uint32_t masks(int lane) const {
    uint32_t mine = 0;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const uint32_t tile = __ballot_sync(0xFFFFFFFFu, expert[i] >= 0);
      if (lane == i) mine = tile;
    }
    return mine;
  }
};

// The loading warp. Tiles without a token that counts are left out; a stage that says so ends the rest. Ids
// are asked for a batch ahead: they queue behind every tile on its way here, and a ring that waited for
// them would have run empty.
template <class R>
__device__ __forceinline__ void load_tiles(const Arguments &a, const Ring &ring, const Share &share,
                                           int lane) {
  const uint64_t policy = evict_first();  // kept in L2, x and dy would cost 2 to 4 us in 60
  const int count = share.count();
  Slot slot;
  Routed next;
  next.ask(a, share, 0, count, lane);
#pragma unroll 1
  for (int first = 0; first < count; first += kBatch) {
    const uint32_t masks = next.masks(lane);
    next.ask(a, share, first + kBatch, count, lane);
    const int last = min(kBatch, count - first);
#pragma unroll 1
    for (int i = 0; i < last; ++i) {
      const uint32_t counted = __shfl_sync(0xFFFFFFFFu, masks, i);
      if (counted == 0) continue;
      if (lane == 0) {
        barrier_wait(ring.empty(slot.stage), slot.parity ^ 1);
        store_shared_word(ring.counted(slot.stage), counted);
        load_tile<R>(a, ring, slot, share.column, share.token(first + i), policy);
      }
      __syncwarp();
      slot.advance(ring.count);
    }
  }
  if (lane == 0) {
    barrier_wait(ring.empty(slot.stage), slot.parity ^ 1);
    store_shared_word(ring.counted(slot.stage), 0);
    barrier_arrive(ring.full(slot.stage));
  }
}

// Zeros for the rows of tokens that do not count, in both factors: what such a row holds may not be finite.
// Eight threads a row; a row of a box is contiguous, its swizzle stays within it.
template <class R>
__device__ __forceinline__ void drop_rows(uint32_t stage, uint32_t counted, int thread) {
  static_assert(kConsumers == 8 * kTokens, "eight threads a token");
  const int row = thread / 8, unit = thread % 8;
  if ((counted >> row) & 1) return;
#pragma unroll
  for (int i = 0; i < R::kColumns / kChunk; ++i) {
    store_shared_words(stage + i * kChunkBytes + row * 128 + unit * 16, {0, 0, 0, 0});
  }
  if (unit * 16 >= R::kBoxRow) return;
#pragma unroll
  for (int i = 0; i < R::kNarrow / R::kBox; ++i) {
    store_shared_words(stage + R::kWideBytes + i * R::kBoxBytes + row * R::kBoxRow + unit * 16,
                       {0, 0, 0, 0});
  }
}

// A warpgroup's sums: of its chunks of wide columns with the columns of each product.
template <class R>
using Sums = float[R::kProducts][R::kChunks][R::kProductColumns / 2];

template <class T, class R>
__device__ __forceinline__ void multiply_tile(Sums<R> &sums, uint32_t stage, int warpgroup) {
  const uint32_t left = low_word(stage + warpgroup * R::kChunks * kChunkBytes, kChunkBytes);
  const uint32_t right = low_word(stage + R::kWideBytes, R::kBoxBytes);
  constexpr int kProductBytes = R::kProductColumns / R::kBox * R::kBoxBytes;
#pragma unroll
  for (int k = 0; k < kTokens; k += 16) {
#pragma unroll
    for (int c = 0; c < R::kChunks; ++c) {
#pragma unroll
      for (int p = 0; p < R::kProducts; ++p) {
        wgmma_rows<T, R::kProductColumns, R::kBoxRow>(
            sums[p][c], left + ((c * kChunkBytes + k * 128) >> 4),
            right + ((p * kProductBytes + k * R::kBoxRow) >> 4));
      }
    }
  }
}

// A multiplying warpgroup. A stage is given back when the products of the next have been queued, so that
// the tensor cores never wait for it.
template <class T, class R>
__device__ __forceinline__ void sum_tiles(Sums<R> &sums, const Ring &ring, int warpgroup, int lane) {
#pragma unroll
  for (int p = 0; p < R::kProducts; ++p) {
#pragma unroll
    for (int c = 0; c < R::kChunks; ++c) clear(sums[p][c]);
  }
  Slot slot;
  uint32_t give_back = 0;  // the barrier of the stage before
  while (true) {
    barrier_wait(ring.full(slot.stage), slot.parity);
    const uint32_t counted = uniform(load_shared_word(ring.counted(slot.stage)));
    if (counted == 0) break;
    const uint32_t stage = ring.stage(slot.stage);
    if (counted != kEveryToken) {
      drop_rows<R>(stage, counted, threadIdx.x);
      fence_async_proxy();
      named_barrier(1, kConsumers);
    }
    wgmma_fence();
    multiply_tile<T, R>(sums, stage, warpgroup);
    wgmma_commit();
    wgmma_wait<1>();
    if (give_back != 0 && lane == 0) barrier_arrive(give_back);
    give_back = ring.empty(slot.stage);
    slot.advance(ring.count);
  }
  wgmma_wait<0>();
#pragma unroll
  for (int p = 0; p < R::kProducts; ++p) {
#pragma unroll
    for (int c = 0; c < R::kChunks; ++c) wgmma_pin(sums[p][c]);
  }
}

// A warp's store covers eight columns with eight ranks each, 256 bytes that lie side by side.
template <class R>
__device__ __forceinline__ void store_parts(const Sums<R> &sums, const Arguments &a, int split,
                                            int first_column, int lane) {
  const int columns = R::kPair ? a.pair_columns : a.up_columns, groups = columns / 8;
  const int64_t group_size = int64_t(a.dim) * 8;
  float *parts = (R::kPair ? a.pair_parts : a.up_parts) +
                 split * (R::kPair ? 2 : 1) * groups * group_size + 2 * (lane % 4);
#pragma unroll
  for (int p = 0; p < R::kProducts; ++p) {
#pragma unroll
    for (int j = 0; j < R::kProductColumns / 8; ++j) {
      const int narrow = p * R::kProductColumns + 8 * j;  // both halves, padded
      const int half = narrow / R::kWidth, start = narrow % R::kWidth;
      if (start >= columns) continue;
      float *group = parts + (half * groups + start / 8) * group_size;
#pragma unroll
      for (int c = 0; c < R::kChunks; ++c) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int column = first_column + c * kChunk + 8 * i;
          if (column < a.dim) {
            *reinterpret_cast<float2 *>(group + column * 8) =
                make_float2(sums[p][c][4 * j + 2 * i], sums[p][c][4 * j + 2 * i + 1]);
          }
        }
      }
    }
  }
}

// Everything a block does with the columns of x (R::kPair) or of dy that are its own.
template <class T, class R>
__device__ __forceinline__ void run_block(const Arguments &a, uint32_t shared, int block) {
  const int column_blocks = R::kPair ? a.pair_blocks : a.up_blocks;
  const Share share = {block % column_blocks * R::kColumns, block / column_blocks, a.splits, a.tiles};
  const Ring ring = make_ring<R>(shared);
  const int warp = static_cast<int>(uniform(threadIdx.x / 32)), lane = threadIdx.x % 32;
  if (warp == kConsumers / 32) {
    load_tiles<R>(a, ring, share, lane);
    return;
  }
  const int warpgroup = warp / 4;
  Sums<R> sums;
  sum_tiles<T, R>(sums, ring, warpgroup, lane);
  const int first_column =
      share.column + warpgroup * R::kChunks * kChunk + warp % 4 * 16 + lane / 4;
  store_parts<R>(sums, a, share.split, first_column, lane);
}

}  // namespace mmadapt::swiglu_weights
