// The host's side of the GEMM of the factored linear layer: what is refused, tensor maps, launch.
#pragma once

#include "../hopper/multiprocessors.h"
#include "../hopper/tensor_map.cuh"
#include "../launch.cuh"
#include "../resident.cuh"
#include "../vec.cuh"
#include "gemm_kernel.cuh"

namespace mmadapt::cp_linear {

inline constexpr char kGemmName[] = "cp_linear_gemm_kernel";

// The constraint that fails, or null.
inline const char *gemm_refusal(const mmadapt_cp_linear_gemm_sm90 &p) {
  if (p.dtype != MMADAPT_BF16 && p.dtype != MMADAPT_F16) return "dtype: expected bf16 or fp16";
  if (p.bias_dtype != p.dtype && p.bias_dtype != MMADAPT_F32) return "bias_dtype: expected dtype or fp32";
  if (p.tokens < 1 || p.tokens > INT32_MAX - 2 * kRows) return "tokens: out of range";
  if (p.inner < 8 || p.inner % 8 != 0) return "inner: expected a multiple of 8";
  if (p.columns < 8 || p.columns % 8 != 0) return "columns: expected a multiple of 8";
  if (p.rank < 0 || p.rank % 8 != 0 || p.rank > MMADAPT_CP_LINEAR_MAX_RANK) {
    return "rank: expected a multiple of 8, at most 128";
  }
  if (p.rank > 0 && (p.core_columns < p.rank || p.core_columns % 8 != 0)) {
    return "core_columns: expected a multiple of 8, at least rank";
  }
  if (p.count < 1 || p.count > MMADAPT_CP_LINEAR_MAX_GROUP) return "count: expected 1 to 8";
  if (p.tile != 0 && p.tile != 128 && p.tile != 192 && p.tile != 256) {
    return "tile: expected 0, 128, 192 or 256";
  }
  if (p.cluster < 0 || p.cluster > 2) return "cluster: expected 0, 1 or 2";
  if (p.group < 0) return "group: expected 0 or more";
  for (int k = 0; k < p.count; ++k) {
    if (!aligned16(p.left[k]) || !aligned16(p.right[k])) {
      return "left, right: expected addresses at multiples of 16";
    }
  }
  for (const void *pointer : {p.core, p.factor, static_cast<const void *>(p.y)}) {
    if (!aligned16(pointer)) return "core, factor, y: expected addresses at multiples of 16";
  }
  return nullptr;
}

// Boxes of `right` [columns, K], or transposed [K, columns]: what a block of the cluster loads of it.
inline cudaError_t right_tiles(CUtensorMap *map, const void *matrix, int columns, int inner, int tile,
                               int cluster, bool transposed) {
  return transposed ? row_tiles(map, matrix, inner, columns, kChunk / cluster)
                    : row_tiles(map, matrix, columns, inner, tile / cluster);
}

inline cudaError_t fill_maps(Arguments &a, const mmadapt_cp_linear_gemm_sm90 &p, int tile) {
  cudaError_t error = row_tiles(&a.y, p.y, p.tokens, p.columns, kStoreRows);
  for (int k = 0; k < p.count && error == cudaSuccess; ++k) {
    error = row_tiles(&a.segments[k].left, p.left[k], p.tokens, p.inner, kRows);
    if (error != cudaSuccess) break;
    error = right_tiles(&a.segments[k].right, p.right[k], p.columns, p.inner, tile, a.cluster, p.transposed);
  }
  if (error != cudaSuccess || p.rank == 0) return error;
  Segment &last = a.segments[p.count];
  error = row_tiles(&last.left, p.core, p.tokens, p.core_columns, kRows);
  if (error != cudaSuccess) return error;
  return right_tiles(&last.right, p.factor, p.columns, p.rank, tile, a.cluster, p.transposed);
}

// All but the tensor maps and the tile.
inline Arguments gemm_arguments(const mmadapt_cp_linear_gemm_sm90 &p) {
  Arguments a = {};
  a.count = p.count;
  a.chunks = (p.inner + kChunk - 1) / kChunk;
  a.rank_chunks = (p.rank + kChunk - 1) / kChunk;
  const int rest = p.rank % kChunk;
  a.last_steps = rest == 0 ? 4 : (rest + 15) / 16;
  a.row_tiles = static_cast<int>((p.tokens + kRows - 1) / kRows);
  a.cluster = p.cluster != 0 ? p.cluster : a.row_tiles > 1 ? 2 : 1;
  const int group = p.group == 0 ? kDefaultGroup : p.group;
  a.group = (group + a.cluster - 1) / a.cluster;
  a.columns = p.columns;
  a.bias = p.bias;
  a.bias_is_fp32 = p.bias_dtype == MMADAPT_F32;
  return a;
}

inline int tile_of(const Arguments &a, const mmadapt_cp_linear_gemm_sm90 &p) {
  return p.tile != 0 ? p.tile : choose_tile(a.row_tiles, p.columns, hopper::kMultiprocessors);
}

// `factor_in`: with RP > 0, whose a.projection is filled but for its maps and parcels.
template <class T, int COLUMNS, Major MAJOR, int RP>
mmadapt_cuda_status launch_gemm(Arguments &a, const mmadapt_cp_linear_gemm_sm90 &p,
                                [[maybe_unused]] const void *factor_in = nullptr) {
  constexpr uint32_t kBytes = kSharedBytes<COLUMNS, RP>;
  mmadapt_cuda_status status = pending_error(kGemmName);
  if (failed(status)) return status;
  const auto kernel = &cp_linear_gemm_kernel<T, COLUMNS, MAJOR, RP>;
  int clusters = 0;
  cudaError_t error = resident_clusters(reinterpret_cast<const void *>(kernel), a.cluster, kThreads,
                                        kBytes, kBytes, &clusters);
  if (error == cudaSuccess && clusters < 1) error = cudaErrorLaunchOutOfResources;
  if (error == cudaSuccess) error = fill_maps(a, p, COLUMNS);
  if constexpr (RP > 0) {
    a.projection.segment.left = a.segments[0].left;
    const Cores &cores = a.projection.cores;
    if (error == cudaSuccess) {
      error = row_tiles(&a.projection.segment.right, factor_in, cores.rank, p.inner, RP / a.cluster);
    }
  }
  if (error != cudaSuccess) {
    cudaGetLastError();
    return cuda_status(error, kGemmName);
  }
  a.column_tiles = (p.columns + COLUMNS - 1) / COLUMNS;
  const int64_t tiles = int64_t((a.row_tiles + a.cluster - 1) / a.cluster) * a.column_tiles;
  if (tiles > INT32_MAX - clusters) return bad_argument("tokens and columns: too many tiles");
  int64_t work = tiles;
  if constexpr (RP > 0) {
    const FusedPlan plan = plan_fused((a.row_tiles + a.cluster - 1) / a.cluster, tiles, clusters, COLUMNS, RP);
    a.projection.parcels = plan.parcels;
    work += plan.parcels;
  }
  if (clusters > work) clusters = static_cast<int>(work);
  return launch({kGemmName, dim3(clusters * a.cluster), dim3(kThreads), kBytes, p.stream,
                 static_cast<unsigned>(a.cluster), /*told=*/true, p.overlap != 0 && p.rank > 0},
                kernel, a);
}

}  // namespace mmadapt::cp_linear
