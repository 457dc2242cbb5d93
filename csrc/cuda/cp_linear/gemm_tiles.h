// How the GEMM of the factored linear layer divides y, K and shared memory. Host and device.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cores.h"

namespace mmadapt::cp_linear {

constexpr int kRows = 128;        // of a tile of y: 64 a consumer warpgroup
constexpr int kChunk = 64;        // of K: a 128-byte row of shared memory
constexpr int kThreads = 3 * 128; // two consuming warpgroups and one that loads
constexpr int kConsumerWarps = 8;
constexpr int kStoreRows = 16;    // a warp's rows
constexpr int kStoreBytes = kStoreRows * 128;
constexpr int kSharedLimit = 232448;  // bytes a block may have on sm_90
constexpr int kDefaultGroup = 16;     // row tiles: 132 tiles of 128 x 256 then read as much x as W
constexpr int kMaxSegments = MMADAPT_CP_LINEAR_MAX_GROUP + 1;

// The tile table: chunks of K in flight by columns of a tile. Registers: 64 x COLUMNS sums of a warpgroup.
constexpr int stages(int columns) { return columns == 128 ? 6 : 4; }

// Byte offsets into shared memory.
template <int COLUMNS>
struct Layout {
  static constexpr int kStages = stages(COLUMNS);
  static constexpr uint32_t kLeftBytes = kRows * 128;
  static constexpr uint32_t kStageBytes = kLeftBytes + COLUMNS * 128;
  static constexpr uint32_t kStores = kStages * kStageBytes;  // two boxes a consumer warp
  static constexpr uint32_t kBias = kStores + kConsumerWarps * 2 * kStoreBytes;  // two tiles' worth
  static constexpr uint32_t kBarriers = kBias + 2 * COLUMNS * 4;
  static constexpr uint32_t kBytes = kBarriers + 8 * (2 * kStages + 4);
  static_assert(kStageBytes % 1024 == 0 && kBytes <= uint32_t(kSharedLimit));
};

// One product of the sum: left [tokens, K] and right, along K.
struct Segment {
  CUtensorMap left, right;
};

// z and the cores as work of the GEMM's own blocks: cp_linear/gemm_project.cuh.
struct Projection {
  Segment segment;  // x and factor_in
  Cores cores;
  int parcels;
  uint32_t *counter;  // of the numbers that clusters take
  uint32_t *done;     // a flag for every 128 rows; counter and flags start as 0
};
// Words of the memory for counter and flags. The counter has a cache line to itself; flags are those of
// clusters of two.
constexpr int kCounterWords = 32;
constexpr int64_t projection_words(int64_t tokens) {
  return kCounterWords + 2 * ((tokens + 2 * kRows - 1) / (2 * kRows));
}

struct Arguments {
  Segment segments[kMaxSegments];  // the low-rank term last
  CUtensorMap y;
  int count, chunks;           // frozen products and each one's chunks
  int rank_chunks;             // of the low-rank term; 0: none
  int last_steps;              // steps of 16 in the very last chunk that are not all zeros: 1..4
  int row_tiles, column_tiles;
  int group;                   // rows of tiles (clusters of them) walked through together
  int cluster;                 // 1 or 2
  int columns;
  int bias_is_fp32;
  const void *bias;
  Projection projection;  // where the kernel makes the cores itself
};

// Tiles in the order in which they are given out: down the rows of a group, then the next column, so that
// the tiles in flight share x and W in L2. `row` counts clusters.
struct Place {
  int row, column;
};
__host__ __device__ inline Place place(int index, int rows, int columns, int group) {
  const int band = index / (group * columns), first = band * group;
  const int height = rows - first < group ? rows - first : group, within = index - first * columns;
  return {first + within % height, within / height};
}

// Columns of a tile: the least time in waves over `blocks`; narrow tiles load more a product.
inline int choose_tile(int64_t row_tiles, int columns, int blocks) {
  int best = 256;
  double least = 0;
  for (const int tile : {256, 192, 128}) {
    const int64_t tiles = row_tiles * ((columns + tile - 1) / tile), waves = (tiles + blocks - 1) / blocks;
    const double time = double(waves) * (tile + (256 - tile) / 8.0);
    if (tile == 256 || time < least) best = tile, least = time;
  }
  return best;
}

// How z is handed out: `units` of rows in `parcels`, each done by one of `clusters` before its tiles.
struct FusedPlan {
  int units, parcels;
  bool hidden;  // by clusters that have one tile less than others
};
// Parcels as large as fit into the time of the tile that the last clusters lack; where tiles divide evenly, or
// the last clusters are too few, one unit each, over as many clusters as there are. A unit's time is that of its
// loads, taken as 48 bytes a cycle, a tile's that of its products; both end alike.
inline FusedPlan plan_fused(int units, int64_t tiles, int clusters, int columns, int ranks) {
  const int rest = static_cast<int>(tiles % clusters), lacking = rest == 0 ? 0 : clusters - rest;
  const int unit_cycles = (kRows + ranks) * 128 / 48, tile_cycles = 4 * columns;  // a chunk of K
  if (lacking > 0) {
    const int each = (units + lacking - 1) / lacking;
    if (each <= tile_cycles / unit_cycles) return {units, (units + each - 1) / each, true};
  }
  return {units, units, false};
}
inline int padded_ranks(int rank) { return rank <= 64 ? 64 : 128; }  // of a product

}  // namespace mmadapt::cp_linear
