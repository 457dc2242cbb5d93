// The register-blocked product that everything is made of, and the layouts it works on.
//
// Tile: a few token rows in fp32. Columns are cut into blocks of BLOCK; a block is [tile rows, LD],
// so that row stride is a compile-time constant and a block's rows stay in the L1 cache.
// Panels: a weight matrix [K, N] cut into column panels of NR = two vectors, each [K, NR].
#pragma once

#include "vec.h"

#ifndef MMADAPT_ROWS
#define MMADAPT_ROWS 6
#endif

namespace {

// MR x NR accumulators + 2 of B + 1 of A fill the registers: 27 of 32 (AVX-512), 15 of 16 (others).
constexpr int MR = MMADAPT_ROWS;
constexpr int NR = 2 * VL;
constexpr int64_t BLOCK = 192;      // divisible by every MR and NR; BLOCK x NR floats are 24 KB
constexpr int64_t LD = BLOCK + 16;  // one cache line more, so that rows do not share cache sets

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

inline int64_t tile_size(int64_t rows, int64_t columns) {
  return ceil_div(columns, BLOCK) * rows * LD + LD;
}
// Address of (row, column) in a tile of `rows` rows.
inline float *at(float *tile, int64_t rows, int64_t row, int64_t column) {
  return tile + (column / BLOCK) * rows * LD + row * LD + column % BLOCK;
}

// C[MR, NR] = (ADD ? C : 0) + A[MR, k] B[k, NR]; element (r, k) of A is a[r * A_ROW + k * A_COL].
// The sum over k starts from zero and is added to C at the end: shorter chains, smaller error.
template <int64_t A_ROW, int64_t A_COL, int64_t LDB, int64_t LDC, bool ADD>
inline void multiply(int64_t depth, const float *a, const float *b, float *c) {
  Vec acc[MR][2];
#pragma GCC unroll 12
  for (int r = 0; r < MR; ++r) acc[r][0] = acc[r][1] = Vec{};
  for (int64_t k = 0; k < depth; ++k, a += A_COL, b += LDB) {
    const Vec b0 = load(b), b1 = load(b + VL);
#pragma GCC unroll 12
    for (int r = 0; r < MR; ++r) {
      const Vec ar = broadcast(a[r * A_ROW]);
      acc[r][0] += ar * b0;
      acc[r][1] += ar * b1;
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < MR; ++r) {
    float *row = c + r * LDC;
    store(row, ADD ? load(row) + acc[r][0] : acc[r][0]);
    store(row + VL, ADD ? load(row + VL) + acc[r][1] : acc[r][1]);
  }
}

// Number of products (steps of `prefetch`) below.
inline int64_t product_count(int64_t used, int64_t depth, int64_t columns) {
  return ceil_div(used, MR) * ceil_div(depth, BLOCK) * ceil_div(columns, NR);
}

struct NoPrefetch {
  void step() {}
};

// out[rows, first..last) = a[rows, depth] panels[depth, first..last), in tiles of `rows` rows of which
// `used` hold tokens; whole panels are written. Blocks of depth are outermost, so that a panel's block
// stays in L1 for all row groups. `prefetch` is stepped once per product of MR rows and NR columns.
template <class Prefetch = NoPrefetch>
inline void tile_times_panels(int64_t rows, int64_t used, int64_t depth, int64_t first, int64_t last,
                              float *a, const float *panels, float *out,
                              Prefetch &&prefetch = Prefetch()) {
  for (int64_t k = 0; k < depth; k += BLOCK) {
    const int64_t kb = min(BLOCK, depth - k);
    for (int64_t n = first; n < last; n += NR) {
      const float *b = panels + n * depth + k * NR;
      for (int64_t r = 0; r < used; r += MR) {
        float *c = at(out, rows, r, n - first);
        const float *ar = at(a, rows, r, k);
        if (k == 0)
          multiply<LD, 1, NR, LD, false>(kb, ar, b, c);
        else
          multiply<LD, 1, NR, LD, true>(kb, ar, b, c);
        prefetch.step();
      }
    }
  }
}

// panels[dim, columns] += a[used, dim]^T b[used, columns]: a weight gradient. Panels are
// round_up(dim, MR) high.
template <class Prefetch = NoPrefetch>
inline void transposed_tile_times_tile(int64_t rows, int64_t used, int64_t dim, int64_t columns,
                                       float *a, float *b, float *panels,
                                       Prefetch &&prefetch = Prefetch()) {
  const int64_t height = round_up(dim, MR);
  for (int64_t block = 0; block < dim; block += BLOCK)
    for (int64_t n = 0; n < columns; n += NR)
      for (int64_t i = block; i < min(block + BLOCK, dim); i += MR) {
        multiply<1, LD, LD, NR, true>(used, at(a, rows, 0, i), at(b, rows, 0, n),
                                      panels + n * height + i * NR);
        prefetch.step();
      }
}

}  // namespace
