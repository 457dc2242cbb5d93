// From the arguments of a launcher to the kernel: checks, packed weights, tensor maps, choice of tile.
#pragma once

#include "../hopper/tensor_map.cuh"
#include "../pack_weights.cuh"
#include "kernel.cuh"
#include "mmadapt/swiglu_adapter_cuda.h"

namespace mmadapt::swiglu {

// What a direction adds to the problem: input rows, output rows.
struct Rows {
  const void *input;
  void *output;
};

// The constraint that fails, or null.
inline const char *refusal(const mmadapt_swiglu_adapter_sm90 &p) {
  if (p.dtype != MMADAPT_BF16 && p.dtype != MMADAPT_F16) return "dtype: expected bf16 or fp16";
  if (p.weight_dtype != p.dtype && p.weight_dtype != MMADAPT_F32) {
    return "weight_dtype: expected dtype or fp32";
  }
  if (p.norm_dtype != p.dtype && p.norm_dtype != MMADAPT_F32) return "norm_dtype: expected dtype or fp32";
  if (p.tokens < 1 || p.tokens > INT32_MAX - 256) return "tokens: out of range";
  if (p.dim < 8 || p.dim % 8 != 0 || p.dim > 8192) return "dim: expected a multiple of 8, at most 8192";
  if (p.rank < 8 || p.rank % 8 != 0 || p.rank > 128) {
    return "rank: expected a multiple of 8, at most 128";
  }
  if (p.experts > kMaxExperts) return "experts: expected at most 32768";
  if (p.experts < 1 || (p.up_experts != 1 && p.up_experts != p.experts)) {
    return "up_experts: expected 1 or as many as experts";
  }
  if (p.experts > 1 && p.expert == nullptr) return "expert: absent, with several experts";
  if (p.residual < MMADAPT_RESIDUAL_NONE || p.residual > MMADAPT_RESIDUAL_NORM) {
    return "residual: out of range";
  }
  if (p.residual == MMADAPT_RESIDUAL_NORM && p.norm_weight == nullptr) {
    return "norm_weight: absent, with the norm as residual";
  }
  if (packs(p) && p.packed == nullptr) return "packed: expected memory for packed weights";
  const int c = p.cluster;
  if (c < 0 || c > 8 || (c & (c - 1)) != 0) return "cluster: expected 0, 1, 2, 4 or 8";
  if (p.rows != 0 && p.rows != 64 && p.rows != 128 && p.rows != 256) {
    return "rows: expected 0, 64, 128 or 256";
  }
  for (const void *pointer : {p.x, p.gate, p.down, p.up, p.norm_weight, (const void *)p.packed}) {
    if (!aligned16(pointer)) {
      return "x, gate, down, up, norm_weight, packed: expected addresses at multiples of 16";
    }
  }
  return nullptr;
}

inline Arguments common(const mmadapt_swiglu_adapter_sm90 &p) {
  Arguments a = {};
  a.tokens = p.tokens;
  a.dim = p.dim;
  a.rank = p.rank;
  a.experts = p.experts;
  a.up_experts = p.up_experts;
  a.norm_is_fp32 = p.norm_dtype == MMADAPT_F32;
  a.residual = p.residual;
  a.scale = p.scale;
  a.eps = p.eps;
  a.expert = p.expert;
  a.norm_weight = p.norm_weight;
  return a;
}

template <class T>
mmadapt_cuda_status map_weights(Arguments &a, const mmadapt_swiglu_adapter_sm90 &p, int padded_rank) {
  PackedWeights w;
  const mmadapt_cuda_status status = pack_weights<T>(p, p.packed, &w);
  if (failed(status)) return status;
  cudaError_t error = tiles(&a.gate, w.gate, p.experts, p.rank, p.dim, padded_rank, 64);
  if (error == cudaSuccess) error = tiles(&a.down, w.down, p.experts, p.rank, p.dim, padded_rank, 64);
  if (error == cudaSuccess) {
    error = tiles(&a.up, w.up, p.up_experts, p.dim, p.rank, 64, padded_rank < 64 ? padded_rank : 64);
  }
  return cuda_status(error, kName);
}

// Every tile for every cluster, or for the one that was asked for.
template <class T, int MP, bool BACKWARD, bool ROUTED>
cudaError_t consider_all(Choice &best, const Arguments &a, int only, int rows) {
  cudaError_t error = cudaSuccess;
  for (int cluster = 1; cluster <= kMaxCluster && error == cudaSuccess; cluster *= 2) {
    if (only == 0 ? cluster > kUsualCluster : cluster != only) continue;
    if (kChunk * (cluster - 1) >= a.dim) continue;
    if constexpr (MP < 128) error = consider<T, Shape<MP, BACKWARD, 1, ROUTED>>(best, a, cluster, rows);
    if (error == cudaSuccess) error = consider<T, Shape<MP, BACKWARD, 2, ROUTED>>(best, a, cluster, rows);
    if (error == cudaSuccess) error = consider<T, Shape<MP, BACKWARD, 4, ROUTED>>(best, a, cluster, rows);
  }
  return error;
}

template <class T, int MP, bool BACKWARD>
mmadapt_cuda_status launch_rank(Arguments &a, const mmadapt_swiglu_adapter_sm90 &p, const Rows &rows) {
  mmadapt_cuda_status status = pending_error(kName);
  if (failed(status)) return status;
  if (kChunk * (p.cluster - 1) >= a.dim) return bad_argument("cluster: a block would have no columns");
  Choice best;
  cudaError_t error = a.expert == nullptr
                          ? consider_all<T, MP, BACKWARD, false>(best, a, p.cluster, p.rows)
                          : consider_all<T, MP, BACKWARD, true>(best, a, p.cluster, p.rows);
  if (error == cudaSuccess && best.kernel == nullptr) {
    return bad_argument("rows, rank, cluster: no such tile fits into shared memory");
  }
  a.plan = best.plan;
  if (error == cudaSuccess) error = row_tiles(&a.input, rows.input, a.tokens, a.dim, best.plan.rows);
  if (error == cudaSuccess && best.plan.inputs == 2) {
    error = row_tiles(&a.second, p.x, a.tokens, a.dim, best.plan.rows);
  }
  if (error == cudaSuccess) error = row_tiles(&a.output, rows.output, a.tokens, a.dim, kGroupRows);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return cuda_status(error, kName);
  }
  if (failed(status = map_weights<T>(a, p, MP))) return status;
  const unsigned cluster = best.plan.cluster;
  return launch({kName, dim3(best.clusters * cluster), dim3(kThreads), best.plan.bytes, p.stream, cluster,
                 /*told=*/true},
                best.kernel, a);
}

template <class T, bool BACKWARD>
mmadapt_cuda_status launch_type(Arguments &a, const mmadapt_swiglu_adapter_sm90 &p, const Rows &rows) {
  if (p.rank <= 32) return launch_rank<T, 32, BACKWARD>(a, p, rows);
  if (p.rank <= 64) return launch_rank<T, 64, BACKWARD>(a, p, rows);
  return launch_rank<T, 128, BACKWARD>(a, p, rows);
}

template <bool BACKWARD>
mmadapt_cuda_status launch_adapter(Arguments &a, const mmadapt_swiglu_adapter_sm90 &p,
                                   const Rows &rows) {
  return p.dtype == MMADAPT_BF16 ? launch_type<__nv_bfloat16, BACKWARD>(a, p, rows)
                                 : launch_type<__half, BACKWARD>(a, p, rows);
}

}  // namespace mmadapt::swiglu
