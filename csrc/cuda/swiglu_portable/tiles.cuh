// Tiles of the portable kernels of the SwiGLU adapter: sizes, places in shared memory, and the stream
// of tiles that a block loads ahead of its work.
//
// A block owns 64 rows and goes over d twice, 64 columns a step: down to the rank, then, last columns
// first, up again. A step's tiles are the block's rows (one or two arrays) and the weights:
//
//     step of    rows    weights                       d ->
//     down       x       gate, down  [2 MP, 64]        (dx: dy [and x], up [64, MP])
//     up         x       up          [64, MP]          (dx: dy and x,   gate, down [2 MP, 64])
//
// With several experts in a tile the steps of each follow one another; a row's results are those of
// its own. One stream of steps for all of it, so that loads never run dry between two passes.
#pragma once

#include <climits>
#include <cstdint>

#include "gate_mma.cuh"
#include "mmadapt/swiglu_adapter.h"
#include "swiglu_portable/instructions.cuh"

namespace mmadapt::portable {

constexpr int kRows = 64, kColumns = 64, kThreads = 256;
constexpr int kRowTile = kRows * kColumns * 2;     // bytes
constexpr int kMostStages = kMostGroups + 2;       // buffers of tiles
constexpr int kNoExpert = INT_MAX;

// Registers of the larger ranks leave room for one block on an SM.
constexpr int blocks_per_sm(int padded_rank) { return padded_rank > 64 ? 1 : 2; }

// What depends on the padded rank MP (32, 64, 128) and the direction.
template <int MP, bool BACKWARD>
struct Sizes {
  static constexpr int kUpRow = 2 * MP;                      // bytes of a row of up
  static constexpr int kDepth = BACKWARD ? 2 * MP : MP;      // of the second product
  static constexpr int kHiddenRow = 2 * kDepth;              // bytes of a row of its left side
  static constexpr int kWeightTile = 2 * MP * kColumns * 2;  // of gate and down; up needs half
  static constexpr int stage_bytes(int row_tiles) { return row_tiles * kRowTile + kWeightTile; }
};

struct Arguments {
  int64_t tokens;
  int dim, rank, experts, up_experts;
  int residual;  // mmadapt_residual
  int norm_is_fp32;
  int stages, row_tiles;    // buffers; arrays of rows in each (2: backward behind a norm)
  float scale, eps;
  const void *x, *dy;       // [T, d]; dy: backward
  const void *gate, *down;  // [E, m, d], the norm's weight in them
  const void *up;           // [EU, d, m]
  const int32_t *expert;    // [T] or null
  const void *norm_weight;  // [d] or null
  void *out;                // y or dx
  void *zg, *zd;            // [T, m], written by forward, read by backward
  float *rstd;              // [T], likewise
  void *dz, *h;             // backward, or null: as in swiglu_adapter_cuda.h
  int dz_experts, h_experts;
};

// Byte of column `16-byte piece` of a row of a tile whose rows are kRowBytes long (64, 128, 256, 512).
// Pieces of eight neighbouring rows lie in different banks, and at(row, 2k + p) = at(row, p) ^ (k << 5)
// for p of 0 and 1.
template <int kRowBytes>
__device__ __forceinline__ uint32_t tile_at(uint32_t row, uint32_t piece) {
  if constexpr (kRowBytes == 64) {
    const uint32_t line = row / 2;
    return line * 128 + ((((row % 2) * 4 + piece) ^ (line % 8)) << 4);
  } else {
    return row * kRowBytes + ((piece ^ (row % 8)) << 4);
  }
}

template <class T>
__device__ __forceinline__ float2 unpack(uint32_t word) {
  Vec<T, 2> pair;
  __builtin_memcpy(&pair, &word, sizeof(word));
  return {to_float(pair.at[0]), to_float(pair.at[1])};
}

// Which experts the rows of a tile go to. `ids` of two rows a lane; every warp has all.
struct Routing {
  int ids[2], first;  // the lowest expert present; 0 without any

  __device__ __forceinline__ int next(int expert) const {
    const int a = ids[0] > expert ? ids[0] : kNoExpert, b = ids[1] > expert ? ids[1] : kNoExpert;
    return __reduce_min_sync(kWholeWarp, min(a, b));
  }
};

__device__ __forceinline__ Routing route(const Arguments &a, int64_t first_row) {
  Routing r;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t row = first_row + threadIdx.x % 32 + 32 * i;
    r.ids[i] = row >= a.tokens ? -1 : a.expert == nullptr ? 0 : a.expert[row];
  }
  r.first = r.next(-1);
  if (r.first == kNoExpert) r.first = 0;
  return r;
}

// A place in the stream of steps: the second pass begins when the first is through.
template <bool BACKWARD>
struct Step {
  int pass, expert, column;  // column: the step's first, counted from 0 in either pass

  __device__ __forceinline__ static bool uses_up(int pass) { return (pass == 1) != BACKWARD; }

  // One set of weights for all rows in this pass.
  __device__ __forceinline__ static bool shared(const Arguments &a, int pass) {
    return uses_up(pass) && a.up_experts == 1;
  }

  __device__ __forceinline__ void advance(const Arguments &a, const Routing &r) {
    column += kColumns;
    if (column < a.dim) return;
    column = 0;
    expert = shared(a, pass) ? kNoExpert : r.next(expert);
    if (expert == kNoExpert) ++pass, expert = r.first;
  }

  // The first of the step's columns of d: the second pass walks backwards, since what was read last
  // is the likeliest to be in L2.
  __device__ __forceinline__ int first_column(const Arguments &a) const {
    return pass == 0 ? column : (a.dim - 1) / kColumns * kColumns - column;
  }
};

// The ring of buffers, and the step whose tiles are loaded next. A thread copies the same pieces of 16
// bytes of every tile: their addresses are made once, those of weights once for each expert.
template <class T, int MP, bool BACKWARD>
struct Stream {
  using S = Sizes<MP, BACKWARD>;
  // Rows and gate and down have 128 bytes, eight pieces, a row; up has 2 MP bytes.
  static constexpr int kRowStep = kThreads / 8, kUpPieces = MP / 8, kUpStep = kThreads / kUpPieces;

  const Arguments &a;
  const Routing &routing;
  const int64_t first_row;
  const uint32_t memory;  // of the buffers
  Step<BACKWARD> load;
  int reading;  // buffer of the step that is worked on

  const int row, piece, up_row, up_piece;  // this thread's first, and the first of eight columns
  const uint32_t place, up_place;          // and where they go in a tile
  const int rows_left;                     // rows of the tile from this thread's first on
  const T *input, *second;                 // x; backward dy and x
  const T *gate, *down, *up;               // of the expert

  __device__ __forceinline__ Stream(const Arguments &a, const Routing &r, int64_t first_row,
                                    uint32_t memory)
      : a(a),
        routing(r),
        first_row(first_row),
        memory(memory),
        load{0, r.first, 0},
        reading(-1),
        row(threadIdx.x / 8),
        piece(threadIdx.x % 8 * 8),
        up_row(threadIdx.x / kUpPieces),
        up_piece(threadIdx.x % kUpPieces * 8),
        place(tile_at<128>(threadIdx.x / 8, threadIdx.x % 8)),
        up_place(tile_at<S::kUpRow>(threadIdx.x / kUpPieces, threadIdx.x % kUpPieces)),
        rows_left(static_cast<int>(min(a.tokens - first_row, static_cast<int64_t>(kRows))) - row) {
    const int64_t own = (first_row + row) * a.dim + piece;
    input = static_cast<const T *>(BACKWARD ? a.dy : a.x) + own;
    second = static_cast<const T *>(a.x) + own;
    choose_weights();
    for (int i = 0; i < a.stages - 1; ++i) load_next(i);
  }

  __device__ __forceinline__ uint32_t buffer(int i) const {
    return memory + i * S::stage_bytes(a.row_tiles);
  }

  // Waits for the next step's tiles; then nobody works on the step before any more, and its buffer
  // takes those of a step to come.
  __device__ __forceinline__ uint32_t next() {
    copies_wait(a.stages - 2);
    __syncthreads();
    const int before = reading < 0 ? a.stages - 1 : reading;
    if (++reading == a.stages) reading = 0;
    load_next(before);
    return buffer(reading);
  }

 private:
  __device__ __forceinline__ void choose_weights() {
    const int64_t weights = static_cast<int64_t>(load.expert) * a.rank * a.dim;
    const int64_t own = weights + static_cast<int64_t>(row) * a.dim + piece;
    gate = static_cast<const T *>(a.gate) + own;
    down = static_cast<const T *>(a.down) + own;
    up = static_cast<const T *>(a.up) + (a.up_experts == 1 ? 0 : weights) +
         static_cast<int64_t>(up_row) * a.rank + up_piece;
  }

  __device__ __forceinline__ void load_next(int into) {
    if (load.pass < 2) {
      const uint32_t to = buffer(into), weights = to + a.row_tiles * kRowTile;
      const int column = load.first_column(a);
      load_rows(to, column);
      if (Step<BACKWARD>::uses_up(load.pass)) {
        load_up(weights, column);
      } else {
        load_gate_down(weights, column);
      }
      const int expert = load.expert;
      load.advance(a, routing);
      if (load.expert != expert) choose_weights();
    }
    copies_commit();
  }

  __device__ __forceinline__ void load_row_tile(uint32_t to, const T *from, int column) const {
    from += column;
#pragma unroll
    for (int i = 0; i < kRows / kRowStep; ++i) {
      copy_async(to + place + i * kRowStep * 128, from + i * kRowStep * a.dim,
                 rows_left > i * kRowStep && column + piece < a.dim);
    }
  }

  __device__ __forceinline__ void load_rows(uint32_t to, int column) const {
    const bool down = load.pass == 0, base = a.residual != MMADAPT_RESIDUAL_NONE;
    if (down || base) load_row_tile(to, input, column);
    if constexpr (BACKWARD) {
      // On the way down x is wanted for the sum of its product with dy alone.
      if (a.row_tiles == 2 && (!down || a.residual == MMADAPT_RESIDUAL_NORM)) {
        load_row_tile(to + kRowTile, second, column);
      }
    }
  }

  // Ranks in rows, first gate's and then down's.
  __device__ __forceinline__ void load_gate_down(uint32_t to, int column) const {
    constexpr int kSteps = MP / kRowStep;
    const bool column_inside = column + piece < a.dim;
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const bool inside = column_inside && row + j * kRowStep < a.rank;
      const int from = column + j * kRowStep * a.dim;
      copy_async(to + place + j * kRowStep * 128, gate + from, inside);
      copy_async(to + place + (j + kSteps) * kRowStep * 128, down + from, inside);
    }
  }

  // Columns of d in rows.
  __device__ __forceinline__ void load_up(uint32_t to, int column) const {
    const T *from = up + static_cast<int64_t>(column) * a.rank;
#pragma unroll
    for (int i = 0; i < kColumns / kUpStep; ++i) {
      copy_async(to + up_place + i * kUpStep * S::kUpRow, from + i * kUpStep * a.rank,
                 column + up_row + i * kUpStep < a.dim && up_piece < a.rank);
    }
  }
};

// The warps of a block: four by rows, sixteen each, and two by columns of the products.
struct Place {
  int lane, group, quad, row, half;  // row: the first of the warp's sixteen

  // Of this lane for load_matrices: a left side, a right side stored by columns, and one stored by
  // rows, to be transposed.
  __device__ __forceinline__ int left_row() const { return row + lane % 16; }
  __device__ __forceinline__ int left_piece() const { return lane / 16; }
  __device__ __forceinline__ int right_row() const { return lane / 16 * 8 + lane % 8; }
  __device__ __forceinline__ int right_piece() const { return lane / 8 % 2; }
  __device__ __forceinline__ int depth_row() const { return lane % 16; }
  __device__ __forceinline__ int depth_piece() const { return lane / 16; }
};

__device__ __forceinline__ Place place() {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  return {lane, lane / 4, lane % 4, 16 * (warp % 4), warp / 4};
}

}  // namespace mmadapt::portable
