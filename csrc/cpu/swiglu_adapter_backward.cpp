// Backward, in one pass over the token rows. With D = dy (and D n = the gradient that reaches n):
//   dh = scale D up                      h = scale silu(zg) zd
//   dzg = dh zd silu'(zg)                dzd = dh silu(zg)
//   D n = [dzg | dzd] [gate; down] + (residual "norm": D)
//   dx = norm backward of D n + (residual "input": D)
//   d[gate; down] += [dzg | dzd]^T n     dup += D^T h      dnorm += D n * x * rstd
// Weight gradients are accumulated while the tile is in cache, one fp32 partial per (part, expert),
// and summed in that order at the end.

#include "rows.h"
#include "weights.h"

namespace {

template <class A, class W>
class BackwardPass {
 public:
  BackwardPass(const mmadapt_swiglu_adapter &problem, const mmadapt::Routing &routing,
               const mmadapt_swiglu_adapter_gradients &gradients)
      : p_(problem), routing_(routing), g_(gradients), s_(problem), w_(problem),
        x_(static_cast<const A *>(problem.x)), dy_(static_cast<const A *>(gradients.dy)),
        zg_(static_cast<const A *>(gradients.zg)), zd_(static_cast<const A *>(gradients.zd)),
        dx_(static_cast<A *>(gradients.dx)), normed_(problem.norm_weight != nullptr),
        want_hidden_(gradients.dgate != nullptr || gradients.ddown != nullptr),
        want_up_(gradients.dup != nullptr),
        want_input_(gradients.dx != nullptr || gradients.dnorm != nullptr),
        rows_(tile_rows(problem.dim, problem.norm_weight != nullptr ? 3 : 2)),
        parts_(part_count(problem)) {}

  mmadapt_status run() {
    norm_ = scratch_.reserve(s_.dim);
    up_ = scratch_.reserve(s_.experts * s_.dim * s_.rank_columns);
    hidden_ = scratch_.reserve(s_.experts * s_.hidden_columns * s_.dim_columns);
    const int64_t tiles = scratch_.reserve(parts_ * part_floats());
    partials_ = scratch_.reserve(partial_count() * partial_floats());
    dnorm_ = scratch_.reserve(parts_ * dnorm_floats());
    if (!scratch_.allocate()) return MMADAPT_OUT_OF_MEMORY;
    if (normed_) load_norm_weight(p_, scratch_[norm_]);

    const int64_t up_panels = s_.rank_columns / NR;
    const int64_t packed_panels = up_panels + (want_input_ ? s_.dim_columns / NR : 0);
    const int64_t hidden_panels = want_hidden_ ? s_.hidden_columns / NR : 0;
    const int64_t unpacked_panels = hidden_panels + (want_up_ ? up_panels : 0);
#pragma omp parallel num_threads(parts_)
    {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < s_.experts * packed_panels; ++i) {
        const int64_t expert = i / packed_panels, panel = i % packed_panels;
        if (routing_.offsets[expert] == routing_.offsets[expert + 1]) continue;
        if (panel < up_panels)
          pack_up(s_, w_, expert, panel, up_of(expert));
        else
          pack_hidden_transposed(s_, w_, expert, panel - up_panels, hidden_of(expert));
      }
#pragma omp for schedule(static, 1)
      for (int64_t part = 0; part < parts_; ++part)
        run_part(part, scratch_[tiles] + part * part_floats());
#pragma omp for schedule(static)
      for (int64_t i = 0; i < s_.experts * unpacked_panels; ++i) {
        const int64_t expert = i / unpacked_panels, panel = i % unpacked_panels;
        if (panel < hidden_panels)
          unpack_hidden(s_, partials_of(expert, expert + 1, 0), expert, panel,
                        static_cast<W *>(g_.dgate), static_cast<W *>(g_.ddown));
        else
          finish_up(expert, panel - hidden_panels);
      }
    }
    if (g_.dnorm != nullptr) finish_norm();
    return MMADAPT_OK;
  }

 private:
  int64_t part_floats() const {
    return round_up(3 * tile_size(rows_, s_.dim) + tile_size(rows_, s_.hidden_columns) +
                        tile_size(rows_, s_.rank_columns),
                    16);
  }
  int64_t partial_floats() const {
    return round_up(s_.height * (s_.hidden_columns + s_.rank_columns), 16);
  }
  // One partial for each (part, expert) that meet; ordered by part, then expert, which is also the
  // order of positions. Hence the partials of an expert are consecutive.
  bool meets(int64_t part, int64_t expert) const {
    const Range mine = part_of(0, routing_.offsets[s_.experts], part, parts_);
    return max(mine.begin, routing_.offsets[expert]) < min(mine.end, routing_.offsets[expert + 1]);
  }
  int64_t partials_before(int64_t part, int64_t expert) const {
    int64_t count = 0;
    for (int64_t p = 0; p < part; ++p)
      for (int64_t e = 0; e < s_.experts; ++e) count += meets(p, e);
    for (int64_t e = 0; e < expert; ++e) count += part < parts_ && meets(part, e);
    return count;
  }
  int64_t partial_count() const {
    return want_hidden_ || want_up_ ? partials_before(parts_, 0) : 0;
  }
  Partials partials_of(int64_t first, int64_t last, int64_t offset) const {
    int64_t before = 0, count = 0;
    for (int64_t p = 0; p < parts_; ++p)
      for (int64_t e = 0; e < last; ++e) (e < first ? before : count) += meets(p, e);
    return {scratch_[partials_] + before * partial_floats() + offset, count, partial_floats()};
  }

  float *up_of(int64_t e) const { return scratch_[up_] + e * s_.dim * s_.rank_columns; }
  float *hidden_of(int64_t e) const {
    return scratch_[hidden_] + e * s_.hidden_columns * s_.dim_columns;
  }
  int64_t row_at(int64_t i) const { return routing_.rows == nullptr ? i : routing_.rows[i]; }

  void run_part(int64_t part, float *memory) const {
    clear(memory, part_floats());
    float *dy = memory;
    float *n = dy + tile_size(rows_, s_.dim);
    float *dn = n + tile_size(rows_, s_.dim);
    float *dz = dn + tile_size(rows_, s_.dim);
    float *h = dz + tile_size(rows_, s_.hidden_columns);
    float *dnorm = dnorm_of(part);
    clear(dnorm, dnorm_floats());
    float *partial = scratch_[partials_] + partials_before(part, 0) * partial_floats();

    const int64_t row_bytes = s_.dim * sizeof(A);
    const int64_t routed = routing_.offsets[s_.experts];
    const Range mine = part_of(0, routed, part, parts_);
    for (int64_t e = 0; e < s_.experts; ++e) {
      if (!meets(part, e)) continue;
      if (want_hidden_ || want_up_) clear(partial, partial_floats());
      const int64_t end = min(mine.end, routing_.offsets[e + 1]);
      for (int64_t i = max(mine.begin, routing_.offsets[e]); i < end; i += rows_) {
        const int64_t used = min(rows_, end - i);
        for (int64_t r = 0; r < used; ++r) {
          load_row(dy_ + row_at(i + r) * s_.dim, s_.dim, dy, rows_, r);
          if (want_hidden_) load_input(row_at(i + r), n, r);
        }
        RowPrefetch<true> result(dx_, row_bytes, routing_, i, dx_ == nullptr ? 0 : used,
                                 product_count(used, s_.dim, s_.rank_columns));
        tile_times_panels(rows_, used, s_.dim, 0, s_.rank_columns, dy, up_of(e), h, result);
        differentiate(i, used, h, dz);
        const int64_t next = i + used, count = min(rows_, end - next);
        RowPrefetch<false> next_x(x_, row_bytes, routing_, next, count,
                                  s_.dim / MR * (s_.hidden_columns / NR));
        RowPrefetch<false> next_dy(dy_, row_bytes, routing_, next, count,
                                   s_.dim / MR * (s_.rank_columns / NR));
        if (want_hidden_)
          transposed_tile_times_tile(rows_, used, s_.dim, s_.hidden_columns, n, dz, partial, next_x);
        if (want_up_)
          transposed_tile_times_tile(rows_, used, s_.dim, s_.rank_columns, dy, h,
                                     partial + s_.height * s_.hidden_columns, next_dy);
        if (want_input_) {
          tile_times_panels(rows_, used, s_.hidden_columns, 0, s_.dim, dz, hidden_of(e), dn);
          for (int64_t r = 0; r < used; ++r) finish_row(row_at(i + r), r, dy, dn, dnorm);
          fold(dnorm);
        }
      }
      partial += partial_floats();
    }

    if (!want_input_) return;
    const Range base = part_of(routed, s_.tokens, part, parts_);
    for (int64_t i = base.begin; i < base.end; ++i) {
      load_row(dy_ + row_at(i) * s_.dim, s_.dim, dy, rows_, 0);
      for_each_vector(dn, rows_, 0, s_.dim,
                      [](int64_t, float *p, auto count) { store_some(p, Vec{}, count); });
      finish_row(row_at(i), 0, dy, dn, dnorm);
      if (i % 64 == 0) fold(dnorm);
    }
    fold(dnorm);
  }

  void load_input(int64_t row, float *n, int64_t r) const {
    const A *x = x_ + row * s_.dim;
    if (normed_)
      load_normed_row(x, scratch_[norm_], g_.rstd[row], s_.dim, n, rows_, r);
    else
      load_row(x, s_.dim, n, rows_, r);
  }

  // On entry h holds dy up; on return h, and dz in the panel order of [gate; down].
  void differentiate(int64_t position, int64_t used, float *h, float *dz) const {
    const Vec scale = broadcast(p_.scale), one = broadcast(1.0f);
    for (int64_t r = 0; r < used; ++r) {
      const int64_t row = row_at(position + r) * s_.rank;
      for (int64_t j = 0; j < s_.rank; j += VL) {
        const int64_t count = min(VL, s_.rank - j);
        const Vec g = load_some(zg_ + row + j, count), d = load_some(zd_ + row + j, count);
        const Vec s = sigmoid(g), silu = g * s;
        float *hidden = at(h, rows_, r, j), *pair = at(dz, rows_, r, 2 * j);
        const Vec dh = scale * load(hidden);
        store(pair, dh * d * s * (one + g * (one - s)));
        store(pair + VL, dh * silu);
        store(hidden, scale * silu * d);
      }
    }
  }

  // From the tiles' row r (dy, and dn without the residual) to dx, and this row's share of dnorm.
  void finish_row(int64_t row, int64_t r, float *dy, float *dn, float *dnorm) const {
    const int64_t to_tile = at(dn, rows_, r, 0) - at(dy, rows_, r, 0);
    const bool add_input = p_.residual == MMADAPT_RESIDUAL_INPUT ||
                           (p_.residual == MMADAPT_RESIDUAL_NORM && !normed_);
    A *dx = dx_ + row * s_.dim;
    if (!normed_) {
      for_each_vector(dy, rows_, r, s_.dim, [&](int64_t i, float *p, auto count) {
        Vec v = load(p + to_tile);
        if (add_input) v += load(p);
        store_some(dx + i, v, count);
      });
      return;
    }
    const A *x = x_ + row * s_.dim;
    const float *weight = scratch_[norm_];
    const Vec rstd = broadcast(g_.rstd[row]);
    Vec dot = {};
    for_each_vector(dy, rows_, r, s_.dim, [&](int64_t i, float *p, auto count) {
      Vec v = load(p + to_tile);
      if (p_.residual == MMADAPT_RESIDUAL_NORM) v += load(p);
      const Vec normalised = load_some(x + i, count) * rstd;
      // Columns past dim hold padding: normalised is 0 there, but 0 * NaN would not be.
      if (count < VL) v = load_head(reinterpret_cast<const float *>(&v), count);
      store(dnorm + i, load(dnorm + i) + v * normalised);
      v *= load_some(weight + i, count);
      dot += v * normalised;
      store_some(p + to_tile, v, count);
    });
    if (dx_ == nullptr) return;
    const Vec mean = broadcast(sum(dot) / static_cast<float>(s_.dim));
    for_each_vector(dy, rows_, r, s_.dim, [&](int64_t i, float *p, auto count) {
      const Vec normalised = load_some(x + i, count) * rstd;
      Vec v = rstd * (load(p + to_tile) - normalised * mean);
      if (add_input) v += load(p);
      store_some(dx + i, v, count);
    });
  }

  void finish_up(int64_t expert, int64_t panel) const {
    const int64_t offset = s_.height * s_.hidden_columns;
    W *dup = static_cast<W *>(g_.dup);
    if (w_.up_experts > 1)
      unpack_up(s_, partials_of(expert, expert + 1, offset), expert, panel, dup);
    else if (expert == 0)  // shared by all: the sum over every partial
      unpack_up(s_, partials_of(0, s_.experts, offset), 0, panel, dup);
  }

  // dnorm is a sum over all tokens, which eager torch adds pairwise: here a few rows are summed in
  // fp32 and then folded into an fp64 total, [dim_columns] floats further on.
  int64_t dnorm_floats() const { return round_up(3 * s_.dim_columns, 16); }
  float *dnorm_of(int64_t part) const { return scratch_[dnorm_] + part * dnorm_floats(); }
  double *total_of(float *dnorm) const { return reinterpret_cast<double *>(dnorm + s_.dim_columns); }
  void fold(float *dnorm) const {
    if (!normed_) return;
    double *total = total_of(dnorm);
    for (int64_t i = 0; i < s_.dim; ++i) total[i] += static_cast<double>(dnorm[i]);
    clear(dnorm, s_.dim_columns);
  }

  void finish_norm() const {
    for (int64_t i = 0; i < s_.dim; ++i) {
      double total = 0;
      for (int64_t part = 0; part < parts_; ++part) total += total_of(dnorm_of(part))[i];
      if (p_.norm_dtype == MMADAPT_F32)
        static_cast<float *>(g_.dnorm)[i] = static_cast<float>(total);
      else
        from_float(static_cast<float>(total), static_cast<bf16 *>(g_.dnorm) + i);
    }
  }

  const mmadapt_swiglu_adapter &p_;
  const mmadapt::Routing &routing_;
  const mmadapt_swiglu_adapter_gradients &g_;
  const Shape s_;
  const Weights<W> w_;
  const A *x_, *dy_, *zg_, *zd_;
  A *dx_;
  const bool normed_, want_hidden_, want_up_, want_input_;
  const int64_t rows_, parts_;
  Scratch scratch_;
  int64_t norm_ = 0, up_ = 0, hidden_ = 0, partials_ = 0, dnorm_ = 0;
};

template <class A>
mmadapt_status run(const mmadapt_swiglu_adapter &p, const mmadapt::Routing &routing,
                   const mmadapt_swiglu_adapter_gradients &g) {
  return p.weight_dtype == MMADAPT_F32 ? BackwardPass<A, float>(p, routing, g).run()
                                       : BackwardPass<A, bf16>(p, routing, g).run();
}

}  // namespace

mmadapt_status mmadapt::MMADAPT_KERNEL(backward)(const mmadapt_swiglu_adapter &p,
                                                 const Routing &routing,
                                                 const mmadapt_swiglu_adapter_gradients &g) {
  return p.activation_dtype == MMADAPT_F32 ? run<float>(p, routing, g) : run<bf16>(p, routing, g);
}
