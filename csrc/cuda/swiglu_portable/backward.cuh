// The gradient of x for one tile of 64 rows, and the factors of the weights' gradients.
//
//     dy [64, d] --(up)--> dh [64, MP], with z: dz [64, 2 MP] --(gate, down)--> + base, - norm --> dx
//
//     dx = base's dy + rstd (dz W) - x rstd^2 / d (sum_j dz_j z_j + rstd sum_i dy_i g_i x_i)
//
// The last sum only where the base is the normalised stream. Warps and shared memory as in forward.cuh.
#pragma once

#include "swiglu_portable/rows.cuh"

namespace mmadapt::portable {

template <class T, int MP>
using BackwardStream = Stream<T, MP, true>;

// kept: dy up of the lane's rows; side: of its part of sum_i dy_i g_i x_i.
template <class T, int MP>
__device__ __forceinline__ void project(float (&kept)[MP / 16][4], float (&side)[2],
                                        BackwardStream<T, MP> &stream, const Place &p,
                                        const Own &own) {
  constexpr int kTiles = MP / 16, kUpRow = Sizes<MP, true>::kUpRow;
  const Arguments &a = stream.a;
  const bool shared = Step<true>::shared(a, 0);
  for (int expert = stream.routing.first; expert != kNoExpert;) {
    const bool product = a.residual == MMADAPT_RESIDUAL_NORM && expert == stream.routing.first;
    float sum[kTiles][4] = {};
    for (int column = 0; column < a.dim; column += kColumns) {
      const uint32_t tile = stream.next(), weights = tile + a.row_tiles * kRowTile;
      float2 norm[2][2];  // of this half's two steps of sixteen columns
      if (product) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const int at = column + 16 * (n / 2 * 2 + p.half) + 8 * (n % 2) + 2 * p.quad;
          norm[n / 2][n % 2] = norm_pair<T>(a, at);
        }
      }
      const uint32_t left = tile + tile_at<128>(p.left_row(), p.left_piece());
      const uint32_t right =
          weights + tile_at<kUpRow>(p.depth_row(), p.half * kTiles + p.depth_piece());
#pragma unroll
      for (int k = 0; k < kColumns / 16; ++k) {
        uint32_t dy[4];
        load_matrices(dy, left ^ (k << 5));
        if (product && k % 2 == p.half) {
          uint32_t x[4];
          load_matrices(x, (left ^ (k << 5)) + kRowTile);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float2 first = unpack<T>(dy[e]), second = unpack<T>(x[e]);
            const float2 g = norm[k / 2][e / 2];
            side[e % 2] += first.x * second.x * g.x + first.y * second.y * g.y;
          }
        }
#pragma unroll
        for (int j = 0; j < kTiles / 2; ++j) {
          uint32_t w[4];
          load_transposed(w, (right ^ (j << 5)) + k * 16 * kUpRow);
          mma(sum[2 * j], dy, w[0], w[1], T{});
          mma(sum[2 * j + 1], dy, w[2], w[3], T{});
        }
      }
    }
    keep(kept, sum, own, expert, shared);
    expert = shared ? kNoExpert : stream.routing.next(expert);
  }
}

// Two neighbouring ranks of a row of [T, experts * m]: in the own expert's columns, zeros in others'.
template <class T>
__device__ __forceinline__ void save(const Arguments &a, void *to, int experts, int64_t row, int rank,
                                     int id, uint32_t pair) {
  for (int e = 0; e < experts; ++e) {
    store_word(static_cast<T *>(to) + (row * experts + e) * a.rank + rank,
               experts == 1 || e == id ? pair : 0u);
  }
}

// dz into shared memory, dz rstd and h scale to memory; dot: the lane's part of sum_j dz_j z_j.
template <class T, int MP>
__device__ __forceinline__ void activate(const Arguments &a, const float (&kept)[MP / 16][4],
                                         float (&dot)[2], const float (&rstd)[2], const Place &p,
                                         const Own &own, int64_t first_row, uint32_t hidden) {
  constexpr int kTiles = MP / 16, kHiddenRow = Sizes<MP, true>::kHiddenRow;
  uint32_t z[kTiles][2][2];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int rank = (p.half * kTiles + t) * 8 + 2 * p.quad;
      const bool inside = first_row + own.row[i] < a.tokens && rank < a.rank;
      const int64_t at = inside ? (first_row + own.row[i]) * a.rank + rank : 0;
      z[t][i][0] = inside ? *reinterpret_cast<const uint32_t *>(static_cast<const T *>(a.zg) + at) : 0;
      z[t][i][1] = inside ? *reinterpret_cast<const uint32_t *>(static_cast<const T *>(a.zd) + at) : 0;
    }
  }
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    const int piece = p.half * kTiles + t, rank = piece * 8 + 2 * p.quad;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 gates = unpack<T>(z[t][i][0]), downs = unpack<T>(z[t][i][1]);
      float dzg[2], dzd[2], h[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float zg = e == 0 ? gates.x : gates.y, zd = e == 0 ? downs.x : downs.y;
        const float dh = a.scale * kept[t][2 * i + e], sig = sigmoid(zg), silu = zg * sig;
        dzd[e] = dh * silu;
        dzg[e] = dh * zd * sig * (1.f + zg * (1.f - sig));
        h[e] = silu * zd * a.scale;
        dot[i] += dzg[e] * zg + dzd[e] * zd;
      }
      const uint32_t at = 4 * p.quad;
      store_shared(hidden + tile_at<kHiddenRow>(own.row[i], piece) + at, pack<T>(dzg[0], dzg[1]));
      store_shared(hidden + tile_at<kHiddenRow>(own.row[i], MP / 8 + piece) + at,
                   pack<T>(dzd[0], dzd[1]));
      const int64_t row = first_row + own.row[i];
      if (row >= a.tokens || rank >= a.rank) continue;
      if (a.dz != nullptr) {
        T *down = static_cast<T *>(a.dz) + a.tokens * a.dz_experts * a.rank;
        save<T>(a, a.dz, a.dz_experts, row, rank, own.id[i],
                pack<T>(dzg[0] * rstd[i], dzg[1] * rstd[i]));
        save<T>(a, down, a.dz_experts, row, rank, own.id[i],
                pack<T>(dzd[0] * rstd[i], dzd[1] * rstd[i]));
      }
      if (a.h != nullptr) {
        save<T>(a, a.h, a.h_experts, row, rank, own.id[i], pack<T>(h[0], h[1]));
      }
    }
  }
}

// dx for the step's 64 columns, into the place of its tile of dy.
template <class T, int MP>
__device__ __forceinline__ void expand(BackwardStream<T, MP> &stream, uint32_t (&dz)[MP / 8][4],
                                       const float (&rstd)[2], const float (&pull)[2], const Place &p,
                                       const Own &own, const Writer<T> &writer, int expert,
                                       int column, bool shared) {
  const Arguments &a = stream.a;
  const uint32_t tile = stream.next(), weights = tile + a.row_tiles * kRowTile;
  float2 norm[4];
  if (a.residual == MMADAPT_RESIDUAL_NORM) {
#pragma unroll
    for (int t = 0; t < 4; ++t) norm[t] = norm_pair<T>(a, column + 32 * p.half + 8 * t + 2 * p.quad);
  }
  const uint32_t right = weights + tile_at<128>(p.depth_row(), 4 * p.half + p.depth_piece());
  float sum[4][4] = {};
#pragma unroll
  for (int k = 0; k < MP / 8; ++k) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      uint32_t w[4];
      load_transposed(w, (right ^ (j << 5)) + k * 16 * 128);
      mma(sum[2 * j], dz[k], w[0], w[1], T{});
      mma(sum[2 * j + 1], dz[k], w[2], w[3], T{});
    }
  }
  const uint32_t first = tile + tile_at<128>(own.row[0], 4 * p.half) + 4 * p.quad;
#pragma unroll
  for (int t = 0; t < 4; ++t) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t at = (first ^ (t << 4)) + i * 8 * 128;
      float2 dx = {0.f, 0.f};
      if (a.residual != MMADAPT_RESIDUAL_NONE) dx = unpack<T>(load_shared(at));
      if (a.residual == MMADAPT_RESIDUAL_NORM) {
        dx = {dx.x * rstd[i] * norm[t].x, dx.y * rstd[i] * norm[t].y};
      }
      if (own.id[i] >= 0) {
        dx.x += rstd[i] * sum[t][2 * i];
        dx.y += rstd[i] * sum[t][2 * i + 1];
      }
      if (a.norm_weight != nullptr) {
        const float2 x = unpack<T>(load_shared(at + kRowTile));
        dx.x -= x.x * pull[i];
        dx.y -= x.y * pull[i];
      }
      store_shared(at, pack<T>(dx.x, dx.y));
    }
  }
  writer.write(a, tile, column, expert, stream.routing.first, shared);
}

template <class T, int MP>
__device__ __forceinline__ void backward_tile(const Arguments &a, uint8_t *memory, float *scalars) {
  constexpr int kHiddenRow = Sizes<MP, true>::kHiddenRow;
  const Place p = place();
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows;
  const Routing routing = route(a, first_row);
  BackwardStream<T, MP> stream(a, routing, first_row, shared_address(memory));
  const Own own = own_rows(a, p, first_row);

  uint32_t dz[MP / 8][4];
  float rstd[2] = {1.f, 1.f}, pull[2] = {0.f, 0.f};
  if (a.norm_weight != nullptr) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (first_row + own.row[i] < a.tokens) rstd[i] = a.rstd[first_row + own.row[i]];
    }
  }
  {
    float kept[MP / 16][4] = {}, side[2] = {}, dot[2] = {};
    project<T, MP>(kept, side, stream, p, own);
    __syncthreads();  // the last step's buffer is free
    const uint32_t hidden = stream.buffer(stream.reading);
    activate<T, MP>(a, kept, dot, rstd, p, own, first_row, hidden);
    put_row_sums(scalars, p, own, dot);
    put_row_sums(scalars + 2 * kRows, p, own, side);
    __syncthreads();
    const uint32_t left = hidden + tile_at<kHiddenRow>(p.left_row(), p.left_piece());
#pragma unroll
    for (int k = 0; k < MP / 8; ++k) load_matrices(dz[k], left ^ (k << 5));
    if (a.norm_weight != nullptr) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float sum = row_sum(scalars, own.row[i]);
        const float base = row_sum(scalars + 2 * kRows, own.row[i]);
        pull[i] = rstd[i] * rstd[i] / a.dim * (sum + rstd[i] * base);
      }
    }
  }
  Step<true> step = {1, routing.first, 0};
  const bool shared = Step<true>::shared(a, 1);
  const Writer<T> writer(a, p, own, first_row);
  while (step.pass == 1) {
    expand<T, MP>(stream, dz, rstd, pull, p, own, writer, step.expert, step.first_column(a), shared);
    step.advance(a, routing);
  }
}

}  // namespace mmadapt::portable
