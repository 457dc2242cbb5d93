// From the arguments of a launcher to the kernel: checks, packed weights, tensor maps, choice of tile.
#pragma once

#include "../adapter_refusal.cuh"
#include "../hopper/tensor_map.cuh"
#include "../pack_weights.cuh"
#include "kernel.cuh"

namespace mmadapt::swiglu {

// What a direction adds to the problem: input rows, output rows.
struct Rows {
  const void *input;
  void *output;
};

constexpr AdapterLimits kLimits = {INT32_MAX - 256, 8192, "dim: expected a multiple of 8, at most 8192",
                                   kMaxExperts, "experts: expected at most 32768"};

// The constraint that fails, or null.
inline const char *refusal(const mmadapt_swiglu_adapter_gpu &p) {
  if (const char *reason = adapter_refusal(p, kLimits)) return reason;
  if (packs(p) && p.packed == nullptr) return "packed: expected memory for packed weights";
  const int c = p.cluster;
  if (c < 0 || c == 1 || c > 8 || (c & (c - 1)) != 0) return "cluster: expected 0, 2, 4 or 8";
  if (p.rows != 0 && p.rows != 64 && p.rows != 128 && p.rows != 256) {
    return "rows: expected 0, 64, 128 or 256";
  }
  return aligned_operands(p)
             ? nullptr
             : "x, gate, down, up, norm_weight, packed: expected addresses at multiples of 16";
}

inline Arguments common(const mmadapt_swiglu_adapter_gpu &p) {
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
mmadapt_cuda_status map_weights(Arguments &a, const mmadapt_swiglu_adapter_gpu &p, int padded_rank) {
  PackedWeights w;
  const mmadapt_cuda_status status = pack_weights<T>(p, &w);
  if (failed(status)) return status;
  cudaError_t error = tiles(&a.gate, w.gate, p.experts, p.rank, p.dim, padded_rank, 64);
  if (error == cudaSuccess) error = tiles(&a.down, w.down, p.experts, p.rank, p.dim, padded_rank, 64);
  if (error == cudaSuccess) {
    error = tiles(&a.up, w.up, p.up_experts, p.dim, p.rank, 64, padded_rank < 64 ? padded_rank : 64);
  }
  return cuda_status(error, kName);
}

// Whether a block of the cluster would have no columns. Two blocks are always allowed, since one alone would need
// barriers and stores of another kind.
inline bool idles(int cluster, int dim) { return cluster > 2 && kChunk * (cluster - 1) >= dim; }

// Every tile for every cluster, or for the one that was asked for.
template <class T, int MP, bool BACKWARD, bool ROUTED>
cudaError_t consider_all(Choice &best, const Arguments &a, int only, int rows) {
  cudaError_t error = cudaSuccess;
  for (int cluster = 2; cluster <= kMaxCluster && error == cudaSuccess; cluster *= 2) {
    if (only == 0 ? cluster > kUsualCluster : cluster != only) continue;
    if (idles(cluster, a.dim)) continue;
    if constexpr (halves(MP) == 1) error = consider<T, Shape<MP, BACKWARD, 1, ROUTED>>(best, a, cluster, rows);
    if (error == cudaSuccess) error = consider<T, Shape<MP, BACKWARD, 2, ROUTED>>(best, a, cluster, rows);
    if (error == cudaSuccess) error = consider<T, Shape<MP, BACKWARD, 4, ROUTED>>(best, a, cluster, rows);
  }
  return error;
}

template <class T, int MP, bool BACKWARD>
mmadapt_cuda_status launch_rank(Arguments &a, const mmadapt_swiglu_adapter_gpu &p, const Rows &rows) {
  mmadapt_cuda_status status = pending_error(kName);
  if (failed(status)) return status;
  if (idles(p.cluster, a.dim)) return bad_argument("cluster: a block would have no columns");
  Choice best;
  cudaError_t error = a.expert == nullptr
                          ? consider_all<T, MP, BACKWARD, false>(best, a, p.cluster, p.rows)
                          : consider_all<T, MP, BACKWARD, true>(best, a, p.cluster, p.rows);
  if (error == cudaSuccess && best.kernel == nullptr) {
    return bad_argument("rows, rank, cluster: no such tile, or it does not fit into shared memory");
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
                 /*told=*/true, /*overlap=*/packs(p)},
                best.kernel, a);
}

template <class T, bool BACKWARD>
mmadapt_cuda_status launch_type(Arguments &a, const mmadapt_swiglu_adapter_gpu &p, const Rows &rows) {
  if (p.rank <= 32) return launch_rank<T, 32, BACKWARD>(a, p, rows);
  if (p.rank <= 64) return launch_rank<T, 64, BACKWARD>(a, p, rows);
  return launch_rank<T, 128, BACKWARD>(a, p, rows);
}

template <bool BACKWARD>
mmadapt_cuda_status launch_adapter(Arguments &a, const mmadapt_swiglu_adapter_gpu &p,
                                   const Rows &rows) {
  return p.dtype == MMADAPT_BF16 ? launch_type<__nv_bfloat16, BACKWARD>(a, p, rows)
                                 : launch_type<__half, BACKWARD>(a, p, rows);
}

}  // namespace mmadapt::swiglu
