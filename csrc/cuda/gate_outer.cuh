// dlogits^T hidden over the masked rows, for a tile of heads and columns, by one block.
//
// The warps of a block share the rows of each window, sixteen or 32 at a time, and add up in order at
// the end: no sum of one block needs another's. hidden is read once for each block of heads. Of the
// two forms, each with its tile and its sums in registers, MmaSums takes 16-bit types, ExactSums fp32
// and sizes that make no vectors: fp32 arithmetic, the rows of a batch summed before they are added
// to the others, since one long chain of additions loses accuracy.
#pragma once

#include "gate_list.cuh"
#include "gate_mma.cuh"

namespace mmadapt {

// Where a block's tile lies: hidden at its first column, dlogits [heads, places] at its first head.
template <class T>
struct OuterTile {
  const T *hidden, *dlogits;
  int64_t places;
  int heads, columns, width;  // the first two: what is left of the matrix from here on
};

template <class T>
struct MmaSums {
  static constexpr int kHeads = 32, kColumns = 32;
  float c[kHeads / 8][2][4] = {};

  // Rows rows[i] of a window for i < count, with dlogits from `place` on. A lane holds four columns of
  // four rows, and of dlogits zeros up to a multiple of eight.
  __device__ __forceinline__ void add(const OuterTile<T> &tile, const uint16_t *rows, int count,
                                      int64_t start, int64_t place) {
    constexpr int kSteps = 4, kStep = kRowWarps * 16;  // in flight at a time
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int group = lane / 4, quad = lane % 4, column = 4 * group;
    const int padded = (count + 7) / 8 * 8;
    const T *x = tile.hidden + start * tile.width + column;
    const T *d = tile.dlogits + group * tile.places + place;
    for (int first = warp * 16; first < count; first += kSteps * kStep) {
      uint32_t k[kSteps][4][2], b[kSteps][kHeads / 8][2];
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const int base = first + s * kStep;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int r = base + lane_k(quad, i);
          uint2 words = {0, 0};
          if (r < count && column < tile.columns) {
            words = *reinterpret_cast<const uint2 *>(x + static_cast<int64_t>(rows[r]) * tile.width);
          }
          k[s][i][0] = words.x, k[s][i][1] = words.y;
        }
#pragma unroll
        for (int n = 0; n < kHeads / 8; ++n) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int r = base + 2 * quad + 8 * half;
            const bool there = r < padded && 8 * n + group < tile.heads;
            b[s][n][half] =
                there ? *reinterpret_cast<const uint32_t *>(d + 8 * n * tile.places + r) : 0;
          }
        }
      }
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          uint32_t a[4];
          transposed(a, k[s], j);
#pragma unroll
          for (int n = 0; n < kHeads / 8; ++n) mma(c[n][j], a, b[s][n][0], b[s][n][1], T{});
        }
      }
    }
  }

  // Into [kHeads, kColumns], by one warp.
  __device__ __forceinline__ void put(float *to) const {
    const int lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
#pragma unroll
    for (int n = 0; n < kHeads / 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float *at = to + (8 * n + 2 * quad + half) * kColumns + 4 * group;
        *reinterpret_cast<float4 *>(at) = {c[n][0][half], c[n][0][2 + half], c[n][1][half],
                                           c[n][1][2 + half]};
      }
    }
  }
};

template <class T, int V>
struct ExactSums {
  static constexpr int kHeads = 8, kColumns = 32 * V;
  float sum[kHeads][V] = {};

  __device__ __forceinline__ void add(const OuterTile<T> &tile, const uint16_t *rows, int count,
                                      int64_t start, int64_t place) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = lane * V;
    const T *x = tile.hidden + start * tile.width + column;
    for (int first = warp * 32; first < count; first += kRowThreads) {
      const int here = min(count - first, 32);
      const int row = lane < here ? rows[first + lane] : 0;
      float d[kHeads], batch[kHeads][V] = {};
#pragma unroll
      for (int j = 0; j < kHeads; ++j) {
        const bool there = lane < here && j < tile.heads;
        d[j] = there ? to_float(tile.dlogits[j * tile.places + place + first + lane]) : 0.f;
      }
#pragma unroll 4
      for (int r = 0; r < here; ++r) {
        const int64_t at = static_cast<int64_t>(__shfl_sync(kWholeWarp, row, r)) * tile.width;
        Vec<T, V> states = {};
        if (column < tile.columns) states = load<T, V>(x + at);
#pragma unroll
        for (int j = 0; j < kHeads; ++j) {
          const float factor = __shfl_sync(kWholeWarp, d[j], r);
#pragma unroll
          for (int e = 0; e < V; ++e) batch[j][e] += factor * to_float(states.at[e]);
        }
      }
#pragma unroll
      for (int j = 0; j < kHeads; ++j) {
#pragma unroll
        for (int e = 0; e < V; ++e) sum[j][e] += batch[j][e];
      }
    }
  }

  __device__ __forceinline__ void put(float *to) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < kHeads; ++j) {
#pragma unroll
      for (int e = 0; e < V; ++e) to[j * kColumns + lane * V + e] = sum[j][e];
    }
  }
};

template <class T, bool kVector>
using OuterSums = std::conditional_t<kVector && sizeof(T) == 2, MmaSums<T>,
                                     ExactSums<T, kVector ? kWide<T> : 1>>;

// out (of the tile, rows of `width`) = the tile's sum over all masked rows.
template <class Sums, class T, class W>
__device__ __forceinline__ void outer_product(const OuterTile<T> &tile,
                                              const uint8_t *__restrict__ mask, int64_t tokens,
                                              W *__restrict__ out) {
  constexpr int kTile = Sums::kHeads * Sums::kColumns;
  // A window's rows, and when all are done each warp's sums.
  __shared__ __align__(16) float shared[kRowWarps * 1024];
  static_assert(kTile <= 1024 && kWindow * sizeof(uint16_t) <= sizeof(shared) && kWindow <= 65536);
  auto *rows = reinterpret_cast<uint16_t *>(shared);
  Sums sums;
  int64_t place = 0;
  for (int64_t start = 0; start < tokens; start += kWindow) {
    const Listed listed = list_window(mask, start, tokens);  // nobody reads the last one's rows now
    put_rows(listed, 0, listed.count, 0, rows);
    __syncthreads();
    sums.add(tile, rows, listed.count, start, place);
    place += (listed.count + kRowWarps - 1) / kRowWarps * kRowWarps;
  }
  __syncthreads();
  sums.put(shared + threadIdx.x / 32 * kTile);
  __syncthreads();
  for (int i = threadIdx.x; i < kTile; i += kRowThreads) {
    const int head = i / Sums::kColumns, column = i % Sums::kColumns;
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < kRowWarps; ++w) sum += shared[w * kTile + i];
    if (head < tile.heads && column < tile.columns) {
      out[static_cast<int64_t>(head) * tile.width + column] = from_float<W>(sum);
    }
  }
}

}  // namespace mmadapt
