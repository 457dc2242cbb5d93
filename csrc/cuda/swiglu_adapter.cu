// The SwiGLU adapter for every GPU from sm_80 on: forward, and the gradient of x.
//
// One block owns 64 rows and streams d twice through shared memory, by cp.async, multiplying with
// mma.sync: down to the rank, then up again from the end backwards, the rows' second reading coming out
// of L2. swiglu_portable/: tiles.cuh is the stream, forward.cuh and backward.cuh what is done with it.

#include "adapter_refusal.cuh"
#include "pack_weights.cuh"
#include "swiglu_portable/backward.cuh"
#include "swiglu_portable/forward.cuh"

namespace mmadapt::portable {
namespace {

constexpr int kScalars = 4 * kRows;  // sums over rows: two of two halves
constexpr int kScalarBytes = kScalars * static_cast<int>(sizeof(float));
constexpr char kName[] = "swiglu_adapter_portable_kernel";

template <class T, int MP, bool BACKWARD>
__global__ void __launch_bounds__(kThreads, blocks_per_sm(MP))
    adapter_kernel(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) uint8_t memory[];
  auto *scalars = reinterpret_cast<float *>(
      memory + a.stages * Sizes<MP, BACKWARD>::stage_bytes(a.row_tiles));
  if constexpr (BACKWARD) {
    backward_tile<T, MP>(a, memory, scalars);
  } else {
    forward_tile<T, MP>(a, memory, scalars);
  }
}

// As many buffers as let `blocks` blocks share an SM, or one at least; below 2 there is no room.
cudaError_t most_stages(int stage_bytes, int blocks, int64_t tiles, int *stages) {
  int device = 0, per_block = 0, per_sm = 0, sms = 0;
  cudaError_t error = cudaGetDevice(&device);
  const auto ask = [&](int *value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, device);
  };
  ask(&per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  ask(&per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  ask(&sms, cudaDevAttrMultiProcessorCount);
  if (error != cudaSuccess) return error;
  const int most = (per_block - kScalarBytes) / stage_bytes;
  const int beside = (per_sm / blocks - 1024 - kScalarBytes) / stage_bytes;
  *stages = tiles > sms && beside >= 2 ? beside : most;
  if (*stages > most) *stages = most;
  if (*stages > kMostStages) *stages = kMostStages;
  return cudaSuccess;
}

template <class T, int MP, bool BACKWARD>
mmadapt_cuda_status launch_kernel(Arguments &a, int stages, void *stream) {
  const int stage_bytes = Sizes<MP, BACKWARD>::stage_bytes(a.row_tiles);
  const int64_t tiles = (a.tokens + kRows - 1) / kRows;
  const cudaError_t error = most_stages(stage_bytes, blocks_per_sm(MP), tiles, &a.stages);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return cuda_status(error, kName);
  }
  if (stages != 0) a.stages = stages;
  if (a.stages < 2) return bad_argument("rank: two buffers do not fit into shared memory");
  return launch({kName, dim3(tiles), dim3(kThreads),
                 static_cast<size_t>(a.stages) * stage_bytes + kScalarBytes, stream},
                adapter_kernel<T, MP, BACKWARD>, a);
}

template <class T, bool BACKWARD>
mmadapt_cuda_status launch_rank(Arguments &a, int stages, void *stream) {
  if (a.rank <= 32) return launch_kernel<T, 32, BACKWARD>(a, stages, stream);
  if (a.rank <= 64) return launch_kernel<T, 64, BACKWARD>(a, stages, stream);
  return launch_kernel<T, 128, BACKWARD>(a, stages, stream);
}

constexpr AdapterLimits kLimits = {INT32_MAX - kRows, 1 << 20, "dim: expected a multiple of 8, at most 2^20",
                                   INT32_MAX, nullptr};

// The constraint that fails, or null.
const char *refusal(const mmadapt_swiglu_adapter_gpu &p) {
  if (const char *reason = adapter_refusal(p, kLimits)) return reason;
  if (p.stages != 0 && (p.stages < 2 || p.stages > kMostStages)) return "stages: expected 0 or 2 to 8";
  if (!aligned_operands(p)) {
    return "x, gate, down, up, norm_weight, workspace: expected addresses at multiples of 16";
  }
  return packs(p) && p.packed == nullptr ? "workspace: expected memory for packed weights" : nullptr;
}

template <bool BACKWARD>
mmadapt_cuda_status run(const mmadapt_swiglu_adapter_gpu &p, Arguments &a) {
  a.tokens = p.tokens;
  a.dim = p.dim;
  a.rank = p.rank;
  a.experts = p.experts;
  a.up_experts = p.up_experts;
  a.residual = p.residual;
  a.norm_is_fp32 = p.norm_dtype == MMADAPT_F32;
  a.row_tiles = BACKWARD && p.norm_weight != nullptr ? 2 : 1;
  a.scale = p.scale;
  a.eps = p.eps;
  a.x = p.x;
  a.expert = p.expert;
  a.norm_weight = p.norm_weight;
  return with_type(p.dtype, "dtype: expected bf16 or fp16", [&](auto t) -> mmadapt_cuda_status {
    using T = typename decltype(t)::type;
    if constexpr (sizeof(T) == 2) {
      PackedWeights weights;
      const auto status = pack_weights<T>(p, &weights);
      if (failed(status)) return status;
      a.gate = weights.gate;
      a.down = weights.down;
      a.up = weights.up;
      return launch_rank<T, BACKWARD>(a, p.stages, p.stream);
    }
    return bad_argument("dtype: expected bf16 or fp16");
  });
}

}  // namespace
}  // namespace mmadapt::portable

using namespace mmadapt;

extern "C" mmadapt_cuda_status mmadapt_swiglu_adapter_forward_portable_cuda(
    const mmadapt_swiglu_adapter_forward_gpu *call) {
  const char *reason = portable::refusal(call->problem);
  if (reason == nullptr && !aligned16(call->y)) reason = "y: expected an address at a multiple of 16";
  if (reason != nullptr) return bad_argument(reason);
  portable::Arguments a = {};
  a.out = call->y;
  a.zg = call->zg;
  a.zd = call->zd;
  a.rstd = call->rstd;
  return portable::run<false>(call->problem, a);
}

extern "C" mmadapt_cuda_status mmadapt_swiglu_adapter_dx_portable_cuda(
    const mmadapt_swiglu_adapter_dx_gpu *call) {
  const char *reason = portable::refusal(call->problem);
  if (reason == nullptr && (!aligned16(call->dy) || !aligned16(call->dx))) {
    reason = "dy, dx: expected addresses at multiples of 16";
  }
  if (reason != nullptr) return bad_argument(reason);
  portable::Arguments a = {};
  a.dy = call->dy;
  a.out = call->dx;
  a.zg = const_cast<void *>(call->zg);  // the backward only reads what the forward writes
  a.zd = const_cast<void *>(call->zd);
  a.rstd = const_cast<float *>(call->rstd);
  a.dz = call->dz;
  a.h = call->h;
  a.dz_experts = call->dz_experts;
  a.h_experts = call->h_experts;
  return portable::run<true>(call->problem, a);
}
