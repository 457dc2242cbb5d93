// Weights of a block's columns, from global memory (fp32 or 16 bits) into shared memory, once a launch.
//
// Stage 1 operand: for each 64 columns of d, rows of 128 bytes: forward, for 16 rows of the product,
// 8 rows of gate and the same 8 of down, so that a thread's two fragment rows are one pair; backward
// up^T. Stage 2 operand: rows are columns of d, along the rank: forward up; backward gate^T, then down^T.
// The norm's weight is multiplied into gate and down. Ranks above m and columns above d are zeros.
#pragma once

#include "../hopper/fragment.cuh"
#include "../hopper/wgmma.cuh"
#include "arguments.h"

namespace mmadapt::swiglu {

using namespace mmadapt::hopper;

// Eight neighbours of a weight matrix as fp32.
template <class T>
__device__ __forceinline__ void load8(float (&v)[8], const void *matrix, int64_t at, bool is_fp32) {
  if (is_fp32) {
    const float4 *from = reinterpret_cast<const float4 *>(static_cast<const float *>(matrix) + at);
    const float4 low = __ldg(from), high = __ldg(from + 1);
    v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
    v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
  } else {
    const uint4 words = __ldg(reinterpret_cast<const uint4 *>(static_cast<const T *>(matrix) + at));
    const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 two = unpack<T>(pairs[i]);
      v[2 * i] = two.x, v[2 * i + 1] = two.y;
    }
  }
}

// `store(i, load(i))` of the calling lane for every i below `total`, i being dealt to the block's warps,
// with several loads in flight.
template <int BATCH, class Load, class Store>
__device__ __forceinline__ void deal(int total, Load load, Store store) {
  const int warps = blockDim.x / 32;
  for (int first = threadIdx.x / 32; first < total; first += BATCH * warps) {
    uint4 v[BATCH];
#pragma unroll
    for (int k = 0; k < BATCH; ++k) {
      if (first + k * warps < total) v[k] = load(first + k * warps);
    }
#pragma unroll
    for (int k = 0; k < BATCH; ++k) {
      if (first + k * warps < total) store(first + k * warps, v[k]);
    }
  }
}

// Eight neighbours along d of gate or down, times the norm's weight; zeros outside.
template <class T>
__device__ __forceinline__ uint4 along_columns(const Arguments &a, const void *matrix, int expert,
                                               int rank, int column) {
  float v[8] = {};
  if (rank < a.rank && column < a.dim) {
    load8<T>(v, matrix, (int64_t(expert) * a.rank + rank) * a.dim + column, a.weight_is_fp32);
    if (a.norm_weight != nullptr) {
      float w[8];
      load8<T>(w, a.norm_weight, column, a.norm_is_fp32);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] *= w[i];
    }
  }
  return {pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7])};
}

// Eight neighbours along the rank of up.
template <class T>
__device__ __forceinline__ uint4 along_ranks(const Arguments &a, int expert, int column, int rank) {
  float v[8] = {};
  if (rank < a.rank && column < a.dim) {
    load8<T>(v, a.up, (int64_t(expert) * a.dim + column) * a.rank + rank, a.weight_is_fp32);
  }
  return {pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7])};
}

// Eight 16-bit numbers, one under another: rows row .. row + 7 of 128 bytes, at `column` of each.
__device__ __forceinline__ void store_down(uint32_t tile, int row, int column, uint4 v) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const uint16_t one = static_cast<uint16_t>(words[k / 2] >> (k % 2 * 16));
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(tile + swizzled(row + k, column / 8, 128) +
                                                 column % 8 * 2),
                 "h"(one)
                 : "memory");
  }
}

constexpr int kBatch = 4;

// A warp takes 256 columns of one row.
template <class T, int MP>
__device__ __forceinline__ void load_gate_down_rows(const Arguments &a, uint32_t to, int first_column) {
  const int rows = a.experts * 2 * MP, lane = threadIdx.x % 32;
  for (int unit = lane; unit < a.plan.columns / 8; unit += 32) {
    const uint32_t chunk = to + unit / 8 * (rows * 128);
    deal<kBatch>(
        rows,
        [&](int row) {
          const int within = row % (2 * MP), rank = within / 16 * 8 + within % 8;
          return along_columns<T>(a, within % 16 < 8 ? a.gate : a.down, row / (2 * MP), rank,
                                  first_column + unit * 8);
        },
        [&](int row, uint4 v) { store_shared_words(chunk + swizzled(row, unit % 8, 128), v); });
  }
}

// A warp takes as many columns as it has lanes for all their ranks.
template <class T, int MP, int PANEL>
__device__ __forceinline__ void load_up_rows(const Arguments &a, uint32_t to, int first_column) {
  constexpr int kUnits = MP / 8, kPerPanel = PANEL / 8, kPanels = MP / PANEL, kColumns = 32 / kUnits;
  const int columns = a.plan.columns, unit = threadIdx.x % kUnits, own = threadIdx.x % 32 / kUnits;
  for (int expert = 0; expert < a.up_experts; ++expert) {
    const uint32_t panel = to + (expert * kPanels + unit / kPerPanel) * (columns * PANEL * 2);
    deal<kBatch>(
        columns / kColumns,
        [&](int i) {
          return along_ranks<T>(a, expert, first_column + i * kColumns + own, unit * 8);
        },
        [&](int i, uint4 v) {
          store_shared_words(panel + swizzled(i * kColumns + own, unit % kPerPanel, PANEL * 2), v);
        });
  }
}

// up^T: a warp takes 8 ranks of 32 columns; the 8 ranks of a column go to 8 rows.
template <class T, int MP>
__device__ __forceinline__ void load_up_transposed(const Arguments &a, uint32_t to, int first_column) {
  constexpr int kGroups = MP / 8;
  const int rows = a.up_experts * MP, lane = threadIdx.x % 32;
  for (int expert = 0; expert < a.up_experts; ++expert) {
    deal<kBatch>(
        a.plan.columns / 32 * kGroups,
        [&](int i) {
          return along_ranks<T>(a, expert, first_column + i / kGroups * 32 + lane, i % kGroups * 8);
        },
        [&](int i, uint4 v) {
          const int c = i / kGroups * 32 + lane;
          store_down(to + c / 64 * (rows * 128), expert * MP + i % kGroups * 8, c % 64, v);
        });
  }
}

// [gate; down]^T: a warp takes 8 ranks of 32 columns; 8 columns of a rank go to 8 rows of a panel.
template <class T, int MP>
__device__ __forceinline__ void load_gate_down_transposed(const Arguments &a, uint32_t to,
                                                          int first_column) {
  constexpr int kGroups = 2 * MP / 8, kPanels = 2 * MP / 64;
  const int columns = a.plan.columns, own_rank = threadIdx.x % 32 / 4, own_unit = threadIdx.x % 4;
  for (int expert = 0; expert < a.experts; ++expert) {
    deal<kBatch>(
        columns / 32 * kGroups,
        [&](int i) {
          const int depth = i % kGroups * 8 + own_rank;
          return along_columns<T>(a, depth < MP ? a.gate : a.down, expert, depth % MP,
                                  first_column + i / kGroups * 32 + own_unit * 8);
        },
        [&](int i, uint4 v) {
          const int depth = i % kGroups * 8 + own_rank;
          store_down(to + (expert * kPanels + depth / 64) * (columns * 128),
                     i / kGroups * 32 + own_unit * 8, depth % 64, v);
        });
  }
}

template <class T, int MP, bool BACKWARD>
__device__ void load_weights(const Arguments &a, uint32_t shared, int first_column) {
  using S = Stage<MP, BACKWARD>;
  const uint32_t first = shared + a.plan.weights1, second = shared + a.plan.weights2;
  if constexpr (BACKWARD) {
    static_assert(S::kPanel == 64);
    load_up_transposed<T, MP>(a, first, first_column);
    load_gate_down_transposed<T, MP>(a, second, first_column);
  } else {
    load_gate_down_rows<T, MP>(a, first, first_column);
    load_up_rows<T, MP, S::kPanel>(a, second, first_column);
  }
  if (a.norm_weight == nullptr) return;
  for (int c = threadIdx.x; c < a.plan.columns; c += blockDim.x) {
    const int column = first_column + c;
    float w = 0.0f;
    if (column < a.dim) {
      w = a.norm_is_fp32 ? static_cast<const float *>(a.norm_weight)[column]
                         : widen(static_cast<const T *>(a.norm_weight)[column]);
    }
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(shared + a.plan.norm + c * 4), "f"(w) : "memory");
  }
}

}  // namespace mmadapt::swiglu
