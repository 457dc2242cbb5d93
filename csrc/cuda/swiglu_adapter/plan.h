// How the Hopper kernels of the SwiGLU adapter divide the work and shared memory. Host and device.
#pragma once

#include <cstdint>
#include <initializer_list>

namespace mmadapt::swiglu {

constexpr int kGroupRows = 64;   // tokens of a row group: of one wgmma
constexpr int kChunk = 64;       // columns that a 128-byte row of shared memory holds
constexpr int kMaxCluster = 8, kUsualCluster = 4;  // that may be asked for, that is chosen
constexpr int kMaxExperts = 1 << 15;
constexpr int kWarpgroups = 4;   // that compute
constexpr int kThreads = kWarpgroups * 128 + 128;  // and a warpgroup of loading warps
constexpr int kComputeRegisters = 112, kLoadRegisters = 32;  // a thread, out of 640 x 96
constexpr int kMaxStages = 12;  // of a ring, and of all rings of one kind
constexpr uint32_t kSharedLimit = 232448;  // bytes a block may have on sm_90
constexpr uint32_t kFragment = 128 * 4;    // bytes of one register of every thread of a warpgroup

// Warpgroups that divide the ranks of a row group among them, since one would read too many weights at a time.
constexpr int halves(int padded_rank) { return padded_rank >= 64 ? 2 : 1; }

// The tile table. MP: the rank, padded to 32, 64 or 128. SPLIT: warpgroups that share a row group: each has every
// kDepths-th of its chunks of columns, in rings of its own; from MP = 64 on two share them, each with half of the
// ranks in stage 1 and half of the columns in stage 2.
template <int MP_, bool BACKWARD_, int SPLIT_, bool ROUTED_>
struct Shape {
  static constexpr int MP = MP_, SPLIT = SPLIT_;
  static constexpr bool BACKWARD = BACKWARD_, ROUTED = ROUTED_;  // ROUTED: rows have experts
  static constexpr int kRowGroups = kWarpgroups / SPLIT, kRows = kRowGroups * kGroupRows;
  static constexpr int kHalves = halves(MP);            // of the ranks
  static constexpr int kDepths = SPLIT / kHalves;       // rings of each kind
  static constexpr int kColumns2 = kChunk / kHalves;    // of a chunk, in stage 2
  static constexpr int kHeld = MP / kHalves;            // ranks whose sums a warpgroup holds
  static constexpr int kGroups = kHeld / 8;             // and groups of 8 of them
  static constexpr int kAllGroups = MP / 8;
  static constexpr int kScalars = BACKWARD ? kAllGroups : 1;  // numbers of a row that come with the operand
  static constexpr int kSums = BACKWARD ? 1 : 2;        // stage 1 gives dh, or z of gate and of down
  // Gate's and down's rows are one operand where a warpgroup takes all ranks.
  static constexpr int kProducts = kSums == 2 && kHalves > 1 ? 2 : 1, kWidth1 = kSums * kHeld / kProducts;
  static constexpr int kOperands = BACKWARD ? 2 : 1;    // stage 2 takes dz of gate and of down, or h
  static constexpr int kSteps2 = MP * kOperands / 16;   // wgmma steps
  static constexpr int kUpRowBytes = MP == 32 ? 64 : 128;
  static constexpr int kPanels = MP == 128 ? 2 : 1;     // of 64 ranks, in a chunk of up
  static constexpr uint32_t kGateDownBytes = 2 * MP * 128, kUpBytes = MP * 128;  // of one chunk
  static constexpr int kReleases = 4 * kRowGroups * kHalves;  // arrivals that empty a stage
  static_assert(kDepths >= 1);
};

// Byte offsets into shared memory, and the sizes that the kernel loops over.
struct Plan {
  int rows;      // of a tile: 64, 128 or 256
  int cluster;   // blocks that share a tile
  int chunks;    // of 64 columns; a block has every `cluster`-th, so that together they read long rows
  int inputs;    // 1, or 2 where the norm's backward needs x beside dy
  int stages, weight_stages;  // of each ring
  uint32_t input_bytes, stage_bytes;  // of one chunk: of one input, of all
  uint32_t weights, sums, sums_bytes, row_sums, hidden, scalars, norm, barriers, bytes;
};

constexpr int kBarriers = 4 * kMaxStages + 2 * kWarpgroups;

// What a launch needs of a norm: nothing; its numbers of each row; its weight too, where its output is the residual.
enum class Norm { kNone, kRows, kColumns };

template <class S>
constexpr Plan lay_out(int dim, int cluster, Norm norm, int stages, int weight_stages) {
  Plan p = {};
  p.rows = S::kRows;
  p.cluster = cluster;
  p.chunks = (dim + kChunk * cluster - 1) / (kChunk * cluster);
  p.inputs = S::BACKWARD && norm != Norm::kNone ? 2 : 1;
  p.stages = stages;
  p.weight_stages = weight_stages;
  p.input_bytes = S::kRows * 128;
  p.stage_bytes = p.input_bytes * p.inputs;
  const int sources = cluster * S::kDepths;
  p.weights = p.stage_bytes * stages * S::kDepths;
  // Sums of one round, for the warpgroups that own one: from every source but the owner itself.
  p.sums = p.weights + S::kGateDownBytes * weight_stages * S::kDepths;
  p.sums_bytes = uint32_t(sources - 1) * S::kSums * 4 * kFragment;
  p.hidden = p.sums + p.sums_bytes * (S::kRowGroups * S::kHalves);
  p.row_sums = p.hidden + uint32_t(S::kRowGroups * S::kOperands * S::kAllGroups) * 2 * kFragment;
  const bool sums_rows = S::BACKWARD ? norm == Norm::kColumns : norm != Norm::kNone;
  p.scalars = p.row_sums + (sums_rows ? uint32_t(S::kRowGroups * S::kHalves * sources) * 256 : 0);
  p.norm = p.scalars + (norm != Norm::kNone ? uint32_t(S::kRowGroups * S::kScalars) * 256 : 0);
  p.barriers = p.norm + (norm == Norm::kColumns ? uint32_t(p.chunks * kChunk) * 4 : 0);
  p.bytes = p.barriers + 8 * kBarriers;
  return p;
}

// The deepest rings that fit: of weights up to 4 stages, of rows at least kEnough bytes, which is what memory
// needs in flight, or as many as there is room for. At least two stages each where that is possible.
constexpr uint32_t kEnough = 96 * 1024;

template <class S>
constexpr Plan make_plan(int dim, int cluster, Norm norm) {
  for (int least : {2, 1}) {
    for (uint32_t enough : {kEnough, 0u}) {
      for (int weight_stages = 4; weight_stages >= least; --weight_stages) {
        if (weight_stages * S::kDepths > kMaxStages) continue;
        for (int stages = kMaxStages / S::kDepths; stages >= least; --stages) {
          const Plan p = lay_out<S>(dim, cluster, norm, stages, weight_stages);
          if (p.bytes <= kSharedLimit && p.weights >= enough) return p;
        }
      }
    }
  }
  return {};  // rows 0: does not fit
}

}  // namespace mmadapt::swiglu
