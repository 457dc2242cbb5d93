// Token rows between memory (any dtype, any order) and fp32 tiles.
#pragma once

#include "problem.h"

namespace {

// Calls f(column, pointer into the tile, count) for each vector of one tile row. `count` is the
// compile-time constant VL but for a last, shorter vector.
struct Whole {
  constexpr operator int64_t() const { return VL; }
};
template <class F>
inline void for_each_vector(float *tile, int64_t rows, int64_t row, int64_t dim, F f) {
  for (int64_t block = 0; block < dim; block += BLOCK) {
    float *p = at(tile, rows, row, block);
    const int64_t width = min(BLOCK, dim - block);
    int64_t c = 0;
    for (; c + VL <= width; c += VL) f(block + c, p + c, Whole());
    if (c < width) f(block + c, p + c, width - c);
  }
}

// Brings rows into L2 a few lines at a time while the arithmetic units are busy: hardware prefetchers
// stop at page borders, and a row is about a page. Without it a quarter of the time is waiting.
template <bool WRITE>
class RowPrefetch {
 public:
  // Rows first..first + count of `routing` in a matrix with `row_bytes` per row, over `steps` steps.
  RowPrefetch(const void *matrix, int64_t row_bytes, const mmadapt::Routing &routing, int64_t first,
              int64_t count, int64_t steps)
      : matrix_(static_cast<const char *>(matrix)),
        row_bytes_(row_bytes),
        rows_(routing.rows),
        position_(first),
        end_(first + max(count, 0)),
        lines_(ceil_div(max(count, 0) * ceil_div(row_bytes, LINE), max(steps, 1))) {}

  void step() {
    for (int64_t i = 0; i < lines_ && position_ < end_; ++i) {
      const int64_t row = rows_ == nullptr ? position_ : rows_[position_];
      __builtin_prefetch(matrix_ + row * row_bytes_ + offset_, WRITE, WRITE ? 3 : 2);
      offset_ += LINE;
      if (offset_ >= row_bytes_) {
        offset_ = 0;
        ++position_;
      }
    }
  }

 private:
  static constexpr int64_t LINE = 64;
  const char *matrix_;
  int64_t row_bytes_;
  const int64_t *rows_;
  int64_t position_, end_, lines_, offset_ = 0;
};

template <class T>
inline Vec load_some(const T *p, int64_t count) {
  return count == VL ? load(p) : load_head(p, count);
}
template <class T>
inline void store_some(T *p, Vec v, int64_t count) {
  if (count == VL)
    store(p, v);
  else
    store_head(p, v, count);
}

template <class A>
inline void load_row(const A *x, int64_t dim, float *tile, int64_t rows, int64_t row) {
  for_each_vector(tile, rows, row, dim, [&](int64_t i, float *p, auto count) {
    store_some(p, load_some(x + i, count), count);
  });
}

// 1 / sqrt(mean(x^2) + eps)
template <class A>
inline float reciprocal_rms(const A *x, int64_t dim, float eps) {
  Vec squares = {};
  int64_t i = 0;
  for (; i + VL <= dim; i += VL) squares += load(x + i) * load(x + i);
  if (i < dim) squares += load_head(x + i, dim - i) * load_head(x + i, dim - i);
  return 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(dim) + eps);
}

// The norm's weight in fp32.
inline void load_norm_weight(const mmadapt_swiglu_adapter &p, float *to) {
  for (int64_t i = 0; i < p.dim; ++i)
    to[i] = p.norm_dtype == MMADAPT_F32 ? static_cast<const float *>(p.norm_weight)[i]
                                        : to_float(static_cast<const bf16 *>(p.norm_weight)[i]);
}

// Row of the tile = rms_norm(x) * weight, in LLaMA's order: the normalised row is rounded to the dtype
// of x before the weight is applied.
template <class A>
inline void load_normed_row(const A *x, const float *weight, float rstd, int64_t dim, float *tile,
                            int64_t rows, int64_t row) {
  for_each_vector(tile, rows, row, dim, [&](int64_t i, float *p, auto count) {
    const Vec unit = rounded_to(x, load_some(x + i, count) * broadcast(rstd));
    store_some(p, unit * load_some(weight + i, count), count);
  });
}

}  // namespace
