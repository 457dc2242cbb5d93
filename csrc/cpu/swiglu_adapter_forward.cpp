// Forward, in one pass over the token rows:
//   tile of x (normed) -> [zg | zd] = n [gate; down]^T -> p = scale silu(zg) zd -> y = base + p up^T
// A tile's rows stay in L2 between the first product and the base, so x is read from memory once.

#include "rows.h"
#include "weights.h"

namespace {

template <class A, class W>
class ForwardPass {
 public:
  ForwardPass(const mmadapt_swiglu_adapter &problem, const mmadapt::Routing &routing,
              const mmadapt_swiglu_adapter_outputs &outputs)
      : p_(problem), routing_(routing), s_(problem), w_(problem),
        x_(static_cast<const A *>(problem.x)), y_(static_cast<A *>(outputs.y)),
        zg_(static_cast<A *>(outputs.zg)), zd_(static_cast<A *>(outputs.zd)), rstd_(outputs.rstd),
        rows_(tile_rows(problem.dim, 1)) {}

  mmadapt_status run() {
    const int64_t parts = part_count(p_);
    const int64_t norm = scratch_.reserve(s_.dim);
    hidden_ = scratch_.reserve(s_.experts * s_.hidden_columns * s_.dim);
    up_ = scratch_.reserve(s_.experts * s_.rank * s_.dim_columns);
    const int64_t tiles = scratch_.reserve(parts * part_floats());
    if (!scratch_.allocate()) return MMADAPT_OUT_OF_MEMORY;
    if (p_.norm_weight != nullptr) load_norm_weight(p_, scratch_[norm]);
    norm_ = scratch_[norm];

    const int64_t hidden_panels = s_.hidden_columns / NR, up_panels = s_.dim_columns / NR;
#pragma omp parallel num_threads(parts)
    {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < s_.experts * (hidden_panels + up_panels); ++i) {
        const int64_t expert = i / (hidden_panels + up_panels);
        const int64_t panel = i % (hidden_panels + up_panels);
        if (routing_.offsets[expert] == routing_.offsets[expert + 1]) continue;
        if (panel < hidden_panels)
          pack_hidden(s_, w_, expert, panel, hidden_of(expert));
        else
          pack_up_transposed(s_, w_, expert, panel - hidden_panels, up_of(expert));
      }
#pragma omp for schedule(static, 1)
      for (int64_t part = 0; part < parts; ++part)
        run_part(part, parts, scratch_[tiles] + part * part_floats());
    }
    return MMADAPT_OK;
  }

 private:
  int64_t part_floats() const {
    return round_up(tile_size(rows_, s_.dim) + tile_size(rows_, s_.hidden_columns) +
                        tile_size(rows_, s_.rank) + tile_size(rows_, BLOCK),
                    16);
  }
  float *hidden_of(int64_t e) const { return scratch_[hidden_] + e * s_.hidden_columns * s_.dim; }
  float *up_of(int64_t e) const { return scratch_[up_] + e * s_.rank * s_.dim_columns; }
  int64_t row_at(int64_t i) const { return routing_.rows == nullptr ? i : routing_.rows[i]; }

  void run_part(int64_t part, int64_t parts, float *memory) const {
    clear(memory, part_floats());
    float *n = memory;
    float *z = n + tile_size(rows_, s_.dim);
    float *h = z + tile_size(rows_, s_.hidden_columns);
    float *out = h + tile_size(rows_, s_.rank);

    const int64_t routed = routing_.offsets[s_.experts];
    const Range mine = part_of(0, routed, part, parts);
    for (int64_t e = 0; e < s_.experts; ++e) {
      const int64_t end = min(mine.end, routing_.offsets[e + 1]);
      for (int64_t i = max(mine.begin, routing_.offsets[e]); i < end; i += rows_) {
        const int64_t used = min(rows_, end - i);
        load_rows(i, used, n);
        const int64_t row_bytes = s_.dim * sizeof(A);
        tile_times_panels(rows_, used, s_.dim, 0, s_.hidden_columns, n, hidden_of(e), z,
                          RowPrefetch<true>(y_, row_bytes, routing_, i, used,
                                            product_count(used, s_.dim, s_.hidden_columns)));
        activate(i, used, z, h);
        RowPrefetch<false> next(x_, row_bytes, routing_, i + used, min(rows_, end - i - used),
                                product_count(used, s_.rank, s_.dim));
        for (int64_t block = 0; block < s_.dim; block += BLOCK) {
          const int64_t width = min(BLOCK, s_.dim - block);
          tile_times_panels(rows_, used, s_.rank, block, block + width, h, up_of(e), out,
                            next);
          store_block(i, used, block, width, n, out);
        }
      }
    }

    const Range base = part_of(routed, s_.tokens, part, parts);
    for (int64_t i = base.begin; i < base.end; ++i) {
      load_rows(i, 1, n);
      std::memset(zg_ + row_at(i) * s_.rank, 0, s_.rank * sizeof(A));
      std::memset(zd_ + row_at(i) * s_.rank, 0, s_.rank * sizeof(A));
      std::memset(out, 0, BLOCK * sizeof(float));
      for (int64_t block = 0; block < s_.dim; block += BLOCK)
        store_block(i, 1, block, min(BLOCK, s_.dim - block), n, out);
    }
  }

  void load_rows(int64_t position, int64_t used, float *n) const {
    for (int64_t r = 0; r < used; ++r) {
      const int64_t row = row_at(position + r);
      const A *x = x_ + row * s_.dim;
      if (p_.norm_weight == nullptr) {
        load_row(x, s_.dim, n, rows_, r);
      } else {
        rstd_[row] = reciprocal_rms(x, s_.dim, p_.eps);
        load_normed_row(x, norm_, rstd_[row], s_.dim, n, rows_, r);
      }
    }
  }

  // h = scale * silu(zg) * zd; zg and zd are saved for the backward pass.
  void activate(int64_t position, int64_t used, float *z, float *h) const {
    for (int64_t r = 0; r < used; ++r) {
      const int64_t row = row_at(position + r);
      for (int64_t j = 0; j < s_.rank; j += VL) {
        const int64_t count = min(VL, s_.rank - j);
        const float *pair = at(z, rows_, r, 2 * j);
        const Vec g = load(pair), d = load(pair + VL);
        store_some(zg_ + row * s_.rank + j, g, count);
        store_some(zd_ + row * s_.rank + j, d, count);
        store(at(h, rows_, r, j), broadcast(p_.scale) * g * sigmoid(g) * d);
      }
    }
  }

  void store_block(int64_t position, int64_t used, int64_t block, int64_t width, float *n,
                   float *out) const {
    const bool none = p_.residual == MMADAPT_RESIDUAL_NONE;
    const bool from_tile = p_.residual == MMADAPT_RESIDUAL_NORM || p_.norm_weight == nullptr;
    for (int64_t r = 0; r < used; ++r) {
      const int64_t offset = row_at(position + r) * s_.dim + block;
      const float *adapter = at(out, rows_, r, 0);
      if (none)
        store_sum(adapter, static_cast<const float *>(nullptr), width, y_ + offset);
      else if (from_tile)
        store_sum(adapter, at(n, rows_, r, block), width, y_ + offset);
      else
        store_sum(adapter, x_ + offset, width, y_ + offset);
    }
  }

  // y = adapter + base
  template <class Base>
  static void store_sum(const float *adapter, const Base *base, int64_t width, A *y) {
    int64_t c = 0;
    for (; c + VL <= width; c += VL)
      store(y + c, base == nullptr ? load(adapter + c) : load(adapter + c) + load(base + c));
    if (c == width) return;
    Vec v = load(adapter + c);
    if (base != nullptr) v += load_head(base + c, width - c);
    store_head(y + c, v, width - c);
  }

  const mmadapt_swiglu_adapter &p_;
  const mmadapt::Routing &routing_;
  const Shape s_;
  const Weights<W> w_;
  const A *x_;
  A *y_, *zg_, *zd_;
  float *rstd_;
  const int64_t rows_;
  const float *norm_ = nullptr;
  Scratch scratch_;
  int64_t hidden_ = 0, up_ = 0;
};

template <class A>
mmadapt_status run(const mmadapt_swiglu_adapter &p, const mmadapt::Routing &routing,
                   const mmadapt_swiglu_adapter_outputs &out) {
  return p.weight_dtype == MMADAPT_F32 ? ForwardPass<A, float>(p, routing, out).run()
                                       : ForwardPass<A, bf16>(p, routing, out).run();
}

}  // namespace

mmadapt_status mmadapt::MMADAPT_KERNEL(forward)(const mmadapt_swiglu_adapter &p,
                                                const Routing &routing,
                                                const mmadapt_swiglu_adapter_outputs &out) {
  return p.activation_dtype == MMADAPT_F32 ? run<float>(p, routing, out)
                                           : run<bf16>(p, routing, out);
}
