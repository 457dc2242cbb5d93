// How the kernel of the weights' gradients divides the work and shared memory. Host and device.
#pragma once

#include <cstdint>

#include "../hopper/multiprocessors.h"

namespace mmadapt::swiglu_weights {

constexpr int kTokens = 32;  // tokens a tile: also the lanes of a warp, one id each
constexpr int kChunk = 64;   // columns of x in a box: a row of 128 bytes, and what one wgmma takes
constexpr int kChunkBytes = kTokens * 128;
constexpr int kWarpgroups = 2;
constexpr int kConsumers = kWarpgroups * 128;
constexpr int kThreads = kConsumers + 32;  // and a loading warp
constexpr int kMaxStages = 12;
constexpr int kControlBytes = 1024;  // barriers, and which tokens of a tile count
constexpr int kSharedBytes = 232448 - kControlBytes;  // of what a block may have on sm_90
constexpr int kMaxColumns = 128;     // of dz (each half) and of h

constexpr int kLeastTiles = 4;  // a split has as many, where it can

// The tile table: a block sums wide^T narrow for `kColumns` columns of the wide factor (x or dy) and all
// columns of the narrow one, W (32, 64, 128) padded columns of h, or of both halves of dz (PAIR).
//
//   W    PAIR  columns  sums a thread  stage    stages
//   32   yes     256          64       20 KB      11
//   32   no      256          32       18 KB      12
//   64   yes     256         128       24 KB       9
//   64   no      256          64       20 KB      11
//   128  yes     128         128       24 KB       9
//   128  no      256         128       24 KB       9
template <int W, bool PAIR>
struct Tile {
  static constexpr int kWidth = W;
  static constexpr bool kPair = PAIR;
  static constexpr int kNarrow = PAIR ? 2 * W : W;
  static constexpr int kProductColumns = kNarrow < 128 ? kNarrow : 128;  // of one wgmma
  static constexpr int kProducts = kNarrow / kProductColumns;
  static constexpr int kChunks = kNarrow > 128 ? 1 : 2;  // of a warpgroup
  static constexpr int kColumns = kWarpgroups * kChunks * kChunk;
  static constexpr int kBox = W < 64 ? W : 64;  // columns of a box of the narrow factor
  static constexpr int kBoxes = W / kBox;       // of h, or of one half of dz
  static constexpr int kBoxRow = kBox * 2;      // bytes
  static constexpr int kBoxBytes = kTokens * kBoxRow;
  static constexpr int kWideBytes = kTokens * kColumns * 2;
  static constexpr int kStageBytes = kWideBytes + kTokens * kNarrow * 2;
  static constexpr int kStages =
      kSharedBytes / kStageBytes < kMaxStages ? kSharedBytes / kStageBytes : kMaxStages;
  static_assert(kStageBytes % 1024 == 0, "the swizzle starts anew every 1024 bytes");
};

struct Plan {
  int width;                   // W; 0: too many columns
  int pair_blocks, up_blocks;  // side by side over the columns of x, of dy
  int splits;                  // of the tokens; a split takes every splits-th tile
  int64_t parts;               // floats
};

constexpr int64_t tiles_of(int64_t tokens) { return (tokens + kTokens - 1) / kTokens; }

inline int blocks_over(int dim, int columns) { return (dim + columns - 1) / columns; }

// `pair_columns`, `up_columns`: of one half of dz and of h; 0: not there.
inline Plan make_plan(int64_t tokens, int dim, int pair_columns, int up_columns) {
  const int most = pair_columns > up_columns ? pair_columns : up_columns;
  if (most < 1 || most > kMaxColumns) return {};
  Plan p = {};
  p.width = most <= 32 ? 32 : most <= 64 ? 64 : 128;
  const int pair_width = p.width == 128 ? Tile<128, true>::kColumns : Tile<64, true>::kColumns;
  p.pair_blocks = pair_columns > 0 ? blocks_over(dim, pair_width) : 0;
  p.up_blocks = up_columns > 0 ? blocks_over(dim, Tile<64, false>::kColumns) : 0;
  const int64_t most_splits = tiles_of(tokens) / kLeastTiles;
  p.splits = hopper::kMultiprocessors / (p.pair_blocks + p.up_blocks);
  if (p.splits > most_splits) p.splits = static_cast<int>(most_splits);
  if (p.splits < 1) p.splits = 1;
  p.parts = int64_t(p.splits) * dim * (2 * int64_t(pair_columns) + up_columns);
  return p;
}

}  // namespace mmadapt::swiglu_weights
