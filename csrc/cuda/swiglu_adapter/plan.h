// How the Hopper kernels of the SwiGLU adapter divide the work and shared memory. Host and device.
#pragma once

#include <cstdint>

namespace mmadapt::swiglu {

constexpr int kRows = 32;        // tokens a tile: also the lanes of a warp, one id each
constexpr int kChunk = 64;       // columns a 128-byte row of shared memory holds
constexpr int kPairs = kRows / 2;
constexpr int kSharedLimit = 232448;  // bytes a block may have on sm_90
constexpr int kMaxWarpgroups = 4;
constexpr int kMaxBuffers = 8;

// What depends on the padded rank MP (32, 64, 128) and on the direction. Stage 1 multiplies by rows of
// length d (gate and down, or up^T), stage 2 by rows of length K2 (up, or [gate; down]^T).
template <int MP, bool BACKWARD>
struct Stage {
  static constexpr int kRows1 = BACKWARD ? MP : 2 * MP;
  static constexpr int kProducts1 = kRows1 < 64 ? 1 : kRows1 / 64;  // of 64 rows each
  static constexpr int kBlocks1 = kRows1 / 16;                      // rows of one warp's fragment
  static constexpr int kDepth2 = BACKWARD ? 2 * MP : MP;
  static constexpr int kPanel = kDepth2 < 64 ? kDepth2 : 64;  // columns of a stage 2 operand's row
  static constexpr int kPanelBytes = kPanel * 2;
  static constexpr int kPanels = kDepth2 / kPanel;
  // As many as registers allow: they are given out to groups of four warps.
  static constexpr int kWarpgroups = MP == 32 ? (BACKWARD ? 3 : 4) : MP == 64 ? 3 : BACKWARD ? 2 : 1;
  static constexpr int kMaxThreads = kWarpgroups * 128 + 64;  // and a loading and a storing warp
};

// Byte offsets into shared memory, and the sizes that the kernel loops over.
struct Plan {
  int cluster;     // blocks that share a tile of rows; each owns `columns` of d
  int columns;     // a multiple of 64
  int chunks;      // columns / 64
  int warpgroups;  // each works on a tile of its own
  int buffers;     // tiles of x (or dy) in flight
  int experts1, experts2;  // weights of stage 1 and stage 2
  int inputs;              // 1, or 2 where the norm's backward needs x beside dy
  // Byte offsets. Of each warpgroup: `sums` holds the blocks' sums for the tokens this one owns, `hidden`
  // the operand of stage 2, `staging` the owned tokens' part of it.
  uint32_t weights1, weights2, tiles, tile_bytes, hidden, hidden_bytes, sums, sums_bytes, staging,
      staging_bytes, scalars, scalars_bytes, norm, barriers, bytes;
};

constexpr uint32_t align_up(uint32_t value, uint32_t to) { return (value + to - 1) / to * to; }

// Scalars of a warpgroup: sums over rows from every block, rstd or the norm's coefficient, ids, and the
// norm's partial sums by group of ranks, 16 a token.
constexpr uint32_t scalars_bytes(int cluster) { return kRows * 4 * 3 + kRows / cluster * 16 * 4; }

template <int MP, bool BACKWARD>
constexpr Plan lay_out(int cluster, int columns, int warpgroups, int buffers, int experts1,
                       int experts2, int inputs) {
  using S = Stage<MP, BACKWARD>;
  Plan p = {};
  p.cluster = cluster;
  p.columns = columns;
  p.chunks = columns / kChunk;
  p.warpgroups = warpgroups;
  p.buffers = buffers;
  p.experts1 = experts1;
  p.experts2 = experts2;
  p.inputs = inputs;
  p.weights1 = 0;
  p.weights2 = p.weights1 + uint32_t(columns) * experts1 * S::kRows1 * 2;
  p.tiles = p.weights2 + uint32_t(columns) * experts2 * S::kDepth2 * 2;
  p.tile_bytes = uint32_t(columns) * kRows * 2 * inputs;
  p.hidden = p.tiles + p.tile_bytes * buffers;
  p.hidden_bytes = uint32_t(kRows) * S::kDepth2 * 2 * experts2;
  p.sums = p.hidden + p.hidden_bytes * warpgroups;
  p.sums_bytes = uint32_t(kPairs) * S::kBlocks1 * 8 * 16;
  p.staging = p.sums + p.sums_bytes * warpgroups;
  // The tokens of one block: operand of stage 2 by expert, and h for the gradient of up.
  p.staging_bytes = uint32_t(kRows / cluster) * (S::kDepth2 * experts2 + (BACKWARD ? MP : 0)) * 2;
  p.scalars = align_up(p.staging + p.staging_bytes * warpgroups, 16);
  p.scalars_bytes = scalars_bytes(cluster);
  p.norm = p.scalars + p.scalars_bytes * warpgroups;
  p.barriers = p.norm + uint32_t(columns) * 4;
  p.bytes = p.barriers + 8 * (3 * kMaxBuffers + 2 * kMaxWarpgroups);
  return p;
}

// The tile table: the first row of this list that fits, for the smallest cluster that does. A tile stays in
// shared memory about 5 us (load, products, two exchanges, store) and memory delivers one every 1 us (32
// x 256 columns, bf16, 128 blocks): five buffers keep it busy.
struct Depth {
  int warpgroups, buffers;
};
constexpr Depth kDepths[] = {{4, 5}, {3, 5}, {2, 4}, {2, 3}, {2, 2}, {1, 2}, {1, 1}};

template <int MP, bool BACKWARD>
Plan make_plan(int dim, int experts1, int experts2, int inputs, int only_cluster) {
  for (const Depth depth : kDepths) {
    if (depth.warpgroups > Stage<MP, BACKWARD>::kWarpgroups) continue;
    for (int cluster = 1; cluster <= 16; cluster *= 2) {
      if (only_cluster != 0 && cluster != only_cluster) continue;
      const int columns = (dim + kChunk * cluster - 1) / (kChunk * cluster) * kChunk;
      if (columns / kChunk > 256 || columns * (cluster - 1) >= dim) continue;
      for (int buffers = kMaxBuffers; buffers >= depth.buffers; --buffers) {
        const Plan p = lay_out<MP, BACKWARD>(cluster, columns, depth.warpgroups, buffers, experts1,
                                             experts2, inputs);
        if (p.bytes <= uint32_t(kSharedLimit)) return p;
      }
    }
  }
  return {};  // cluster 0: does not fit
}

}  // namespace mmadapt::swiglu
