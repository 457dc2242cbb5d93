// What both directions do with the rows of a tile: who owns them, the norm's weight, the way out.
#pragma once

#include "swiglu_portable/tiles.cuh"

namespace mmadapt::portable {

// The two rows of a lane's part of a product: `row` of the tile, and eight below.
struct Own {
  int row[2], id[2];
};

__device__ __forceinline__ Own own_rows(const Arguments &a, const Place &p, int64_t first_row) {
  Own own;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    own.row[i] = p.row + p.group + 8 * i;
    const int64_t row = first_row + own.row[i];
    own.id[i] = row >= a.tokens ? -1 : a.expert == nullptr ? 0 : a.expert[row];
  }
  return own;
}

// Into `kept` from `sum` where the row is one of the expert's, whose weights were multiplied by;
// `shared`: of any expert's. What other weights gave, infinities perhaps, goes nowhere.
template <int kTiles>
__device__ __forceinline__ void keep(float (&kept)[kTiles][4], const float (&sum)[kTiles][4],
                                     const Own &own, int expert, bool shared) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (shared ? own.id[i] < 0 : own.id[i] != expert) continue;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      kept[t][2 * i] = sum[t][2 * i];
      kept[t][2 * i + 1] = sum[t][2 * i + 1];
    }
  }
}

// Two neighbouring entries of the norm's weight; zeros past the end.
template <class T>
__device__ __forceinline__ float2 norm_pair(const Arguments &a, int column) {
  if (column >= a.dim) return {0.f, 0.f};
  if (a.norm_is_fp32) {
    return *reinterpret_cast<const float2 *>(static_cast<const float *>(a.norm_weight) + column);
  }
  return unpack<T>(*reinterpret_cast<const uint32_t *>(static_cast<const T *>(a.norm_weight) + column));
}

// Of every row, from the partial sums of a warp's lanes: the sum over the four lanes that share it,
// for whom the other half's warp then adds its own (`row_sum`). `sums`: [2, kRows].
__device__ __forceinline__ void put_row_sums(float *sums, const Place &p, const Own &own,
                                             const float (&of_lane)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float sum = of_lane[i];
    sum += __shfl_xor_sync(kWholeWarp, sum, 1);
    sum += __shfl_xor_sync(kWholeWarp, sum, 2);
    if (p.quad == 0) sums[p.half * kRows + own.row[i]] = sum;
  }
}

__device__ __forceinline__ float row_sum(const float *sums, int row) {
  return sums[row] + sums[kRows + row];
}

// The way out of a warp's sixteen rows and 32 columns of a finished tile, 16 bytes a lane and row.
template <class T>
struct Writer {
  T *to;           // this lane's first row and column in the array
  uint32_t from;   // and in the tile
  int id[2], column;
  bool inside[2];

  __device__ __forceinline__ Writer(const Arguments &a, const Place &p, const Own &own,
                                    int64_t first_row) {
    const int row = p.row + p.lane % 8, piece = 4 * p.half + p.lane / 8;
    to = static_cast<T *>(a.out) + (first_row + row) * a.dim + piece * 8;
    from = tile_at<128>(row, piece);
    column = piece * 8;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      id[i] = __shfl_sync(kWholeWarp, own.id[i], p.lane % 8 * 4);
      inside[i] = first_row + row + 8 * i < a.tokens;
    }
  }

  // Of the rows whose results are those of this pass: `shared`, all of them.
  __device__ __forceinline__ void write(const Arguments &a, uint32_t tile, int first_column,
                                        int expert, int first_expert, bool shared) const {
    __syncwarp();  // the tile is complete
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool mine = shared || id[i] == expert || (id[i] < 0 && expert == first_expert);
      if (mine && inside[i] && first_column + column < a.dim) {
        store_word(to + first_column + 8 * i * a.dim, load_shared_16(tile + from + i * 8 * 128));
      }
    }
  }
};

__device__ __forceinline__ float sigmoid(float z) { return 1.f / (1.f + __expf(-z)); }

}  // namespace mmadapt::portable
