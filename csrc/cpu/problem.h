// Sizes derived from a problem, its division among threads, and one block of scratch memory.
#pragma once

#include "kernel.h"
#include "tile.h"

namespace {

struct Shape {
  int64_t tokens, dim, rank, experts;
  // gate and down are packed side by side: each panel holds VL columns of gate, then the same VL of
  // down, so that both pre-activations of a column come out of one product.
  int64_t hidden_columns;  // 2 * rank rounded up to VL
  int64_t rank_columns;    // rank rounded up to NR
  int64_t dim_columns;     // dim rounded up to NR
  int64_t height;          // dim rounded up to MR

  explicit Shape(const mmadapt_swiglu_adapter &p)
      : tokens(p.tokens),
        dim(p.dim),
        rank(p.rank),
        experts(p.experts),
        hidden_columns(2 * round_up(p.rank, VL)),
        rank_columns(round_up(p.rank, NR)),
        dim_columns(round_up(p.dim, NR)),
        height(round_up(p.dim, MR)) {}
};

// Rows per tile: enough that weights in L1 and L2 are used many times, few enough that `tiles` tiles
// of `dim` columns stay in a part of L2 (1 MB and more on servers, shared with the weights).
inline int64_t tile_rows(int64_t dim, int tiles) {
  const int64_t fit = (512 * 1024 / 4) / (tiles * dim) / MR * MR;
  return max(MR, min(48, fit));
}

// Part `index` of `parts` of the positions begin..end, cut at multiples of MR. The cut depends on the
// number of parts alone, never on which thread comes first: reruns are bit-equal.
struct Range {
  int64_t begin, end;
};
inline Range part_of(int64_t begin, int64_t end, int64_t index, int64_t parts) {
  const int64_t step = round_up(ceil_div(end - begin, parts), MR);
  return {min(begin + index * step, end), min(begin + (index + 1) * step, end)};
}

// Threads worth waking: each gets 4 MFLOP, about 40 us, or waiting for the slowest costs more than it
// brings (on a busy machine, where a thread may not be running at all, a thousand times more).
inline int64_t part_count(const mmadapt_swiglu_adapter &p) {
  const double work = 6.0 * static_cast<double>(p.tokens) * p.dim * p.rank / 4e6;
  const int64_t worth = work < p.threads ? static_cast<int64_t>(work) : p.threads;
  return max(1, min(worth, ceil_div(p.tokens, 2 * MR)));
}

// Scratch of one call: sizes are added first, then one allocation is handed out in pieces.
class Scratch {
 public:
  int64_t reserve(int64_t floats) {
    const int64_t offset = floats_;
    floats_ += round_up(floats, 16);  // whole cache lines: threads share none
    return offset;
  }
  bool allocate() {
    memory_ = mmadapt::acquire_scratch(max(floats_, 16) * static_cast<int64_t>(sizeof(float)));
    return memory_ != nullptr;
  }
  float *operator[](int64_t offset) const { return memory_ + offset; }
  ~Scratch() { mmadapt::release_scratch(); }

 private:
  int64_t floats_ = 0;
  float *memory_ = nullptr;
};

// Padding rows and columns of tiles are computed with and thrown away; uninitialised memory there
// could hold denormal numbers, which are slow. Each thread clears its own: first touch is local.
inline void clear(float *memory, int64_t floats) { std::memset(memory, 0, floats * sizeof(float)); }

}  // namespace
