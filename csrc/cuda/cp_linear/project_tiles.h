// How the skinny product x factor_in^T divides rows, K and shared memory. Host and device.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "../hopper/multiprocessors.h"
#include "cores.h"

namespace mmadapt::cp_linear::project {

constexpr int kRows = 128;   // of x a cluster owns: 64 a consumer warpgroup
constexpr int kChunk = 64;   // of K: a 128-byte row of shared memory
constexpr int kConsumers = 256;
constexpr int kThreads = kConsumers + 32;  // and a warp that loads
constexpr int kMaxSplit = 8;

// RP: ranks, padded to a product's columns. Two blocks have room in an SM's 228 KB.
template <int RP>
struct Layout {
  static constexpr int kStages = RP == 16 ? 6 : RP == 32 ? 5 : RP == 64 ? 4 : 3;
  static constexpr uint32_t kLeftBytes = kRows * 128;
  static constexpr uint32_t kStageBytes = kLeftBytes + RP * 128;
  // After the products: the sums, [kRows][kStride] in fp32, rows apart so that no two meet in a bank.
  static constexpr int kStride = RP + 8;
  static constexpr uint32_t kKept = kRows * kStride * 4;  // and a bit for each entry of z
  static constexpr uint32_t kBarriers = kStages * kStageBytes;
  static constexpr uint32_t kBytes = kBarriers + 8 * 2 * kStages;
  static_assert(kKept + kRows * RP / 8 <= kBarriers && kBytes <= 113 * 1024);
};

struct Arguments {
  CUtensorMap x, factor;
  int chunks, split;
  int dense;  // bit k: mode k is a matrix
  Cores cores;
};

// Parts of K, each of two chunks or more: as many as give every SM one block. (Two blocks an SM were slower:
// 8192 rows of 4096, 21.8 us in 2 parts, 29.7 in 4; and eight parts than four: 2048 rows, 10.6 and 9.7.)
inline int choose_split(int64_t row_tiles, int chunks) {
  int split = 1;
  while (split < kMaxSplit && row_tiles * split * 2 <= hopper::kMultiprocessors / (split < 4 ? 1 : 2) &&
         split * 4 <= chunks) {
    split *= 2;
  }
  return split;
}

}  // namespace mmadapt::cp_linear::project
