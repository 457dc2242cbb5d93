// Forward of one tile of 64 rows.
//
//     x [64, d] --(gate, down)--> z [64, 2 MP] --> h [64, MP] --(up)--> + base --> y [64, d]
//
// z is summed in registers: a warp has sixteen rows and half of the ranks, of gate and of down alike,
// so that h is made where z lies. h goes through shared memory to the warps that multiply by it.
#pragma once

#include "swiglu_portable/rows.cuh"

namespace mmadapt::portable {

template <class T, int MP>
using ForwardStream = Stream<T, MP, false>;

// kept: z of the lane's rows, gate's ranks and then down's; squares: of its part of x.
template <class T, int MP>
__device__ __forceinline__ void project(float (&kept)[MP / 8][4], float (&squares)[2],
                                        ForwardStream<T, MP> &stream, const Place &p,
                                        const Own &own) {
  constexpr int kTiles = MP / 16;  // of each of the two
  const Arguments &a = stream.a;
  for (int expert = stream.routing.first; expert != kNoExpert;) {
    const bool square = a.norm_weight != nullptr && expert == stream.routing.first;
    float sum[2 * kTiles][4] = {};
    for (int column = 0; column < a.dim; column += kColumns) {
      const uint32_t tile = stream.next(), weights = tile + kRowTile;
      const uint32_t left = tile + tile_at<128>(p.left_row(), p.left_piece());
      const uint32_t right =
          weights + tile_at<128>(p.half * (MP / 2) + p.right_row(), p.right_piece());
#pragma unroll
      for (int k = 0; k < kColumns / 16; ++k) {
        uint32_t x[4];
        load_matrices(x, left ^ (k << 5));
        if (square && k % 2 == p.half) {  // the other half's warp has the same rows
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float2 pair = unpack<T>(x[e]);
            squares[e % 2] += pair.x * pair.x + pair.y * pair.y;
          }
        }
#pragma unroll
        for (int part = 0; part < 2; ++part) {
#pragma unroll
          for (int j = 0; j < kTiles / 2; ++j) {
            uint32_t w[4];
            load_matrices(w, (right ^ (k << 5)) + (part * MP + 16 * j) * 128);
            mma(sum[part * kTiles + 2 * j], x, w[0], w[1], T{});
            mma(sum[part * kTiles + 2 * j + 1], x, w[2], w[3], T{});
          }
        }
      }
    }
    keep(kept, sum, own, expert, false);
    expert = stream.routing.next(expert);
  }
}

// h = silu(z_gate) z_down into shared memory; z to memory.
template <class T, int MP>
__device__ __forceinline__ void activate(const Arguments &a, const float (&kept)[MP / 8][4],
                                         const float (&rstd)[2], const Place &p, const Own &own,
                                         int64_t first_row, uint32_t hidden) {
  constexpr int kTiles = MP / 16;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    const int piece = p.half * kTiles + t, rank = piece * 8 + 2 * p.quad;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float zg[2], zd[2], h[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        zg[e] = kept[t][2 * i + e] * rstd[i];
        zd[e] = kept[kTiles + t][2 * i + e] * rstd[i];
        h[e] = zg[e] * sigmoid(zg[e]) * zd[e];
      }
      store_shared(hidden + tile_at<Sizes<MP, false>::kHiddenRow>(own.row[i], piece) + 4 * p.quad,
                   pack<T>(h[0], h[1]));
      if (first_row + own.row[i] < a.tokens && rank < a.rank) {
        const int64_t at = (first_row + own.row[i]) * a.rank + rank;
        store_word(static_cast<T *>(a.zg) + at, pack<T>(zg[0], zg[1]));
        store_word(static_cast<T *>(a.zd) + at, pack<T>(zd[0], zd[1]));
      }
    }
  }
}

// y for the step's 64 columns, from its tile of x.
template <class T, int MP>
__device__ __forceinline__ void expand(ForwardStream<T, MP> &stream, uint32_t (&h)[MP / 16][4],
                                       const float (&rstd)[2], const Place &p, const Own &own,
                                       const Writer<T> &writer, int expert, int column,
                                       bool shared) {
  constexpr int kUpRow = Sizes<MP, false>::kUpRow;
  const Arguments &a = stream.a;
  const uint32_t tile = stream.next(), weights = tile + kRowTile;
  float2 norm[4];
  if (a.residual == MMADAPT_RESIDUAL_NORM) {
#pragma unroll
    for (int t = 0; t < 4; ++t) norm[t] = norm_pair<T>(a, column + 32 * p.half + 8 * t + 2 * p.quad);
  }
  const uint32_t right = weights + tile_at<kUpRow>(32 * p.half + p.right_row(), p.right_piece());
  float sum[4][4] = {};
#pragma unroll
  for (int k = 0; k < MP / 16; ++k) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      uint32_t w[4];
      load_matrices(w, (right ^ (k << 5)) + j * 16 * kUpRow);
      mma(sum[2 * j], h[k], w[0], w[1], T{});
      mma(sum[2 * j + 1], h[k], w[2], w[3], T{});
    }
  }
  const uint32_t first = tile + tile_at<128>(own.row[0], 4 * p.half) + 4 * p.quad;
#pragma unroll
  for (int t = 0; t < 4; ++t) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t at = (first ^ (t << 4)) + i * 8 * 128;
      float2 y = {0.f, 0.f};
      if (a.residual != MMADAPT_RESIDUAL_NONE) y = unpack<T>(load_shared(at));
      if (a.residual == MMADAPT_RESIDUAL_NORM) {
        y = {y.x * rstd[i] * norm[t].x, y.y * rstd[i] * norm[t].y};
      }
      if (own.id[i] >= 0) {
        y.x += a.scale * sum[t][2 * i];
        y.y += a.scale * sum[t][2 * i + 1];
      }
      store_shared(at, pack<T>(y.x, y.y));
    }
  }
  writer.write(a, tile, column, expert, stream.routing.first, shared);
}

template <class T, int MP>
__device__ __forceinline__ void forward_tile(const Arguments &a, uint8_t *memory, float *scalars) {
  constexpr int kHiddenRow = Sizes<MP, false>::kHiddenRow;
  const Place p = place();
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows;
  const Routing routing = route(a, first_row);
  ForwardStream<T, MP> stream(a, routing, first_row, shared_address(memory));
  const Own own = own_rows(a, p, first_row);

  uint32_t h[MP / 16][4];
  float rstd[2] = {1.f, 1.f};
  {
    float kept[MP / 8][4] = {}, squares[2] = {};
    project<T, MP>(kept, squares, stream, p, own);
    if (a.norm_weight != nullptr) put_row_sums(scalars, p, own, squares);
    __syncthreads();  // all sums are there, and the last step's buffer is free
    if (a.norm_weight != nullptr) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        rstd[i] = 1.f / sqrtf(row_sum(scalars, own.row[i]) / a.dim + a.eps);
        const int64_t row = first_row + own.row[i];
        if (p.half == 0 && p.quad == 0 && row < a.tokens) a.rstd[row] = rstd[i];
      }
    }
    const uint32_t hidden = stream.buffer(stream.reading);
    activate<T, MP>(a, kept, rstd, p, own, first_row, hidden);
    __syncthreads();
    const uint32_t left = hidden + tile_at<kHiddenRow>(p.left_row(), p.left_piece());
#pragma unroll
    for (int k = 0; k < MP / 16; ++k) load_matrices(h[k], left ^ (k << 5));
  }
  Step<false> step = {1, routing.first, 0};
  const bool shared = Step<false>::shared(a, 1);
  const Writer<T> writer(a, p, own, first_row);
  while (step.pass == 1) {
    expand<T, MP>(stream, h, rstd, p, own, writer, step.expert, step.first_column(a), shared);
    step.advance(a, routing);
  }
}

}  // namespace mmadapt::portable
