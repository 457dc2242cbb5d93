// Weights to fp32 panels, once per call and in parallel by panel; gradient panels back to weights.
#pragma once

#include "problem.h"

namespace {

template <class W>
struct Weights {
  const W *gate, *down, *up;
  int64_t up_experts;

  explicit Weights(const mmadapt_swiglu_adapter &p)
      : gate(static_cast<const W *>(p.gate)),
        down(static_cast<const W *>(p.down)),
        up(static_cast<const W *>(p.up)),
        up_experts(p.up_experts) {}
  const W *up_of(const Shape &s, int64_t expert) const {
    return up + (up_experts == 1 ? 0 : expert) * s.dim * s.rank;
  }
};

// to[c * step] = from[c] for c < used, 0 up to count
template <class W>
inline void copy_row(const W *from, int64_t used, int64_t count, float *to, int64_t step) {
  for (int64_t c = 0; c < used; ++c) to[c * step] = to_float(from[c]);
  for (int64_t c = max(used, 0); c < count; ++c) to[c * step] = 0;
}

// Panel of [gate; down] as a [dim, hidden_columns] matrix.
template <class W>
void pack_hidden(const Shape &s, const Weights<W> &w, int64_t expert, int64_t panel, float *panels) {
  float *to = panels + panel * NR * s.dim;
  for (int64_t i = 0; i < s.dim; i += 64) {  // in pieces, so that the strided writes stay in L1
    const int64_t n = min(64, s.dim - i);
    for (int64_t v = 0; v < VL; ++v) {
      const int64_t j = panel * VL + v, used = j < s.rank ? n : 0;
      const int64_t from = (expert * s.rank + j) * s.dim + i;
      copy_row(w.gate + from, used, n, to + i * NR + v, NR);
      copy_row(w.down + from, used, n, to + i * NR + VL + v, NR);
    }
  }
}

// Panel of the same as a [hidden_columns, dim] matrix.
template <class W>
void pack_hidden_transposed(const Shape &s, const Weights<W> &w, int64_t expert, int64_t panel,
                            float *panels) {
  float *to = panels + panel * NR * s.hidden_columns;
  const int64_t i = panel * NR;
  for (int64_t k = 0; k < s.hidden_columns; ++k) {
    const int64_t v = k % NR, j = k / NR * VL + v % VL;
    const W *from = v < VL ? w.gate : w.down;
    copy_row(from + (expert * s.rank + j) * s.dim + i, j < s.rank ? min(NR, s.dim - i) : 0, NR,
             to + k * NR, 1);
  }
}

// Panel of up as a [dim, rank_columns] matrix.
template <class W>
void pack_up(const Shape &s, const Weights<W> &w, int64_t expert, int64_t panel, float *panels) {
  float *to = panels + panel * NR * s.dim;
  const W *from = w.up_of(s, expert) + panel * NR;
  const int64_t used = min(NR, s.rank - panel * NR);
  for (int64_t i = 0; i < s.dim; ++i) copy_row(from + i * s.rank, used, NR, to + i * NR, 1);
}

// Panel of up as a [rank, dim_columns] matrix.
template <class W>
void pack_up_transposed(const Shape &s, const Weights<W> &w, int64_t expert, int64_t panel,
                        float *panels) {
  float *to = panels + panel * NR * s.rank;
  for (int64_t c = 0; c < NR; ++c) {
    const int64_t i = panel * NR + c;
    copy_row(w.up_of(s, expert) + i * s.rank, i < s.dim ? s.rank : 0, s.rank, to + c, NR);
  }
}

// Gradient panels summed over `count` consecutive partials, `stride` floats apart, in that order.
struct Partials {
  const float *first;
  int64_t count, stride;
  float sum(int64_t offset) const {
    float total = 0;
    for (int64_t p = 0; p < count; ++p) total += first[p * stride + offset];
    return total;
  }
};

// Panel of the gradient of [gate; down] ([height, hidden_columns]) to dgate or ddown; null = skip.
template <class W>
void unpack_hidden(const Shape &s, const Partials &partials, int64_t expert, int64_t panel, W *dgate,
                   W *ddown) {
  for (int64_t i = 0; i < s.dim; i += 64) {
    const int64_t n = min(64, s.dim - i);
    for (int64_t v = 0; v < NR; ++v) {
      const int64_t j = panel * VL + v % VL;
      W *to = v < VL ? dgate : ddown;
      if (to == nullptr || j >= s.rank) continue;
      to += (expert * s.rank + j) * s.dim + i;
      for (int64_t c = 0; c < n; ++c)
        from_float(partials.sum(panel * NR * s.height + (i + c) * NR + v), to + c);
    }
  }
}

// Panel of the gradient of up ([height, rank_columns]) to dup[expert].
template <class W>
void unpack_up(const Shape &s, const Partials &partials, int64_t expert, int64_t panel, W *dup) {
  const int64_t used = min(NR, s.rank - panel * NR);
  for (int64_t i = 0; i < s.dim; ++i)
    for (int64_t c = 0; c < used; ++c)
      from_float(partials.sum(panel * NR * s.height + i * NR + c),
                 dup + (expert * s.dim + i) * s.rank + panel * NR + c);
}

}  // namespace
