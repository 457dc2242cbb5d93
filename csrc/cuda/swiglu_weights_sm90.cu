// Gradients of the SwiGLU adapter's weights on Hopper: sums over tokens of outer products.
//
//   G = x^T [dz_gate | dz_down], dgate = (g G_gate)^T, ddown = (g G_down)^T, g the norm's weight
//   U = dy^T h, dup = U
//
// One factor is wide (x, dy: d columns), one narrow (dz, h: a column for every rank of every expert), and
// the sum runs over all tokens. So x and dy are read once, and the rest is small: a block owns 128 or 256
// columns of x or of dy, every narrow column, and every S-th tile of 32 tokens; S is chosen so that there is
// one block for each multiprocessor. Its sums stay in registers:
//
//        x or dy [T, d]            dz or h [T, narrow]
//        32 x 64 boxes             32 x 32 or 32 x 64 boxes
//              |                        |
//              | TMA, one loading warp  |
//              v                        v
//        +----------------------------------+  ring of 9 to 12 stages, 18 to 24 KB each
//        | [32, columns]    | [32, narrow]  |  rows of tokens without an expert: zeros
//        +----------------------------------+
//                 |  wgmma: both factors as they lie, rows of tokens, summed over the rows
//                 v
//        two warpgroups: D [columns, narrow], fp32, over the whole run of tokens
//                 |
//                 v
//        parts [S, narrow / 8, d, 8]  --->  sum_splits_kernel: added in ascending order, times g,
//                                           rounded once, transposed
//
// Tiles in which no token has an expert are not read. The number of splits is a function of the shapes, the
// order of every sum is fixed: reruns are bit-equal. What happens inside a block: swiglu_weights/outer.cuh.

#include <cuda_runtime.h>

#include "hopper/tensor_map.cuh"
#include "launch.cuh"
#include "mmadapt/swiglu_weights_cuda.h"
#include "swiglu_weights/outer.cuh"
#include "swiglu_weights/sums.cuh"

namespace mmadapt::swiglu_weights {
namespace {

constexpr char kName[] = "swiglu_adapter_weights_kernel";

template <class T, int W>
__global__ void __launch_bounds__(kThreads, 1)
    weights_kernel(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t shared = local(memory);
  if (threadIdx.x == 0) {
    const Ring ring = {shared, shared + kSharedBytes, 0, kMaxStages};
    for (int i = 0; i < kMaxStages; ++i) {
      barrier_init(ring.full(i), 1);
      barrier_init(ring.empty(i), kConsumers / 32);
    }
    barrier_init_fence();
    fence_async_proxy();
  }
  __syncthreads();
  const int pair_total = a.pair_blocks * a.splits, block = static_cast<int>(blockIdx.x);
  if (block < pair_total) {
    run_block<T, Tile<W, true>>(a, shared, block);
  } else {
    run_block<T, Tile<W, false>>(a, shared, block - pair_total);
  }
}

template <class T, int W>
mmadapt_cuda_status launch_parts(const Arguments &a, void *stream) {
  const unsigned blocks = unsigned(a.pair_blocks + a.up_blocks) * unsigned(a.splits);
  return launch({kName, dim3(blocks), dim3(kThreads), kSharedBytes + kControlBytes, stream},
                weights_kernel<T, W>, a);
}

template <class T>
mmadapt_cuda_status launch_width(const Arguments &a, int width, void *stream) {
  if (width == 32) return launch_parts<T, 32>(a, stream);
  if (width == 64) return launch_parts<T, 64>(a, stream);
  return launch_parts<T, 128>(a, stream);
}

using Problem = mmadapt_swiglu_weights_sm90;

template <class T, class W>
mmadapt_cuda_status launch_sums(const Problem &p, const Arguments &a) {
  SumArguments s = {};
  s.norm_weight = p.norm_weight;
  s.norm_is_fp32 = p.norm_dtype == MMADAPT_F32;
  s.splits = a.splits;
  s.dim = p.dim;
  s.rank = p.rank;
  const int64_t half = int64_t(a.pair_columns) * p.dim, up = int64_t(a.up_columns) * p.dim;
  unsigned needed = 0;
  if (p.dgate != nullptr) {
    s.sums[needed++] = {a.pair_parts, 2 * half, half, p.dgate, false, p.norm_weight != nullptr};
  }
  if (p.ddown != nullptr) {
    s.sums[needed++] = {a.pair_parts + half, 2 * half, half, p.ddown, false, p.norm_weight != nullptr};
  }
  if (p.dup != nullptr) s.sums[needed++] = {a.up_parts, up, up, p.dup, true, false};
  int64_t most = 0;
  for (const Sum &sum : s.sums) most = sum.count > most ? sum.count : most;
  constexpr int kEach = kSumThreads * kSumWidth;
  const Launch how = {"swiglu_adapter_weights_sum_kernel",
                      dim3(static_cast<unsigned>((most + kEach - 1) / kEach), needed),
                      dim3(kSumThreads), 0, p.stream};
  return needed == 0 ? ok() : launch(how, sum_splits_kernel<T, W>, s);
}

template <class T, class W>
mmadapt_cuda_status launch_norm(const Problem &p, const Arguments &a) {
  if (p.dnorm == nullptr) return ok();
  const NormArguments n = {a.pair_parts, p.gate, p.down, p.sums, p.dnorm,
                           p.norm_dtype == MMADAPT_F32, a.splits, a.pair_columns, p.dim, p.count_sums};
  return launch({"swiglu_adapter_norm_weight_kernel", dim3((p.dim + 31) / 32),
                 dim3(32 * kNormWarps), 0, p.stream},
                norm_weight_kernel<T, W>, n);
}

template <class T, class W>
mmadapt_cuda_status launch_all(const Problem &p, const Arguments &a, int width) {
  mmadapt_cuda_status status = launch_width<T>(a, width, p.stream);
  if (failed(status)) return status;
  if (failed(status = launch_sums<T, W>(p, a))) return status;
  return launch_norm<T, W>(p, a);
}

template <class T>
mmadapt_cuda_status launch_typed(const Problem &p, const Arguments &a, int width) {
  return p.weight_dtype == MMADAPT_F32 ? launch_all<T, float>(p, a, width)
                                       : launch_all<T, T>(p, a, width);
}

// The constraint that fails, or null.
const char *refusal(const Problem &p, const Plan &plan) {
  if (p.dtype != MMADAPT_BF16 && p.dtype != MMADAPT_F16) return "dtype: expected bf16 or fp16";
  if (p.weight_dtype != p.dtype && p.weight_dtype != MMADAPT_F32) {
    return "weight_dtype: expected dtype or fp32";
  }
  if (p.norm_dtype != p.dtype && p.norm_dtype != MMADAPT_F32) return "norm_dtype: expected dtype or fp32";
  if (p.tokens < 1 || p.tokens > INT32_MAX - kTokens) return "tokens: out of range";
  if (p.dim < 8 || p.dim % 8 != 0) return "dim: expected a multiple of 8";
  if (p.rank < 8 || p.rank % 8 != 0) return "rank: expected a multiple of 8";
  if (plan.width == 0) {
    return "dz_experts, h_experts: expected 1 to 128 columns (experts times rank) in dz or in h";
  }
  const bool through_dz = p.dgate != nullptr || p.ddown != nullptr || p.dnorm != nullptr;
  if (through_dz != (p.dz_experts > 0)) return "dz_experts: goes with dgate, ddown or dnorm";
  if ((p.dup != nullptr) != (p.h_experts > 0)) return "h_experts: goes with dup";
  if (p.dnorm != nullptr && (p.norm_weight == nullptr || p.gate == nullptr || p.down == nullptr)) {
    return "dnorm: needs norm_weight, gate and down";
  }
  for (const void *pointer : {p.x, p.dy, p.dz, p.h, static_cast<const void *>(p.parts)}) {
    if (!aligned16(pointer)) return "x, dy, dz, h, parts: expected addresses at multiples of 16";
  }
  return nullptr;
}

// `columns` 64 or 32: those of a box.
mmadapt_cuda_status boxes_of(CUtensorMap *map, const void *rows, const Problem &p, int total_columns,
                             int columns) {
  return cuda_status(tiles(map, rows, 0, p.tokens, total_columns, kTokens, columns), kName);
}

mmadapt_cuda_status fill_maps(Arguments &a, const Problem &p, int width) {
  const int box = width < kChunk ? width : kChunk;
  mmadapt_cuda_status status = ok();
  if (a.pair_columns > 0) {
    // Two matrices, so that what lies past the last token reads as zero in both.
    const void *down = static_cast<const char *>(p.dz) + p.tokens * a.pair_columns * 2;
    if (failed(status = boxes_of(&a.x, p.x, p, p.dim, kChunk))) return status;
    if (failed(status = boxes_of(&a.gate, p.dz, p, a.pair_columns, box))) return status;
    if (failed(status = boxes_of(&a.down, down, p, a.pair_columns, box))) return status;
  }
  if (a.up_columns > 0) {
    if (failed(status = boxes_of(&a.dy, p.dy, p, p.dim, kChunk))) return status;
    if (failed(status = boxes_of(&a.h, p.h, p, a.up_columns, box))) return status;
  }
  return status;
}

Plan plan_of(const Problem &p) {
  return make_plan(p.tokens, p.dim, p.dz_experts * p.rank, p.h_experts * p.rank);
}

}  // namespace
}  // namespace mmadapt::swiglu_weights

using namespace mmadapt;

extern "C" mmadapt_swiglu_weights_plan mmadapt_swiglu_weights_plan_sm90(int64_t tokens, int32_t dim,
                                                                        int32_t dz_columns,
                                                                        int32_t h_columns) {
  const swiglu_weights::Plan p = swiglu_weights::make_plan(tokens, dim, dz_columns, h_columns);
  return {p.width, p.pair_blocks, p.up_blocks, p.splits, p.parts};
}

extern "C" mmadapt_cuda_status mmadapt_swiglu_weights_cuda(const mmadapt_swiglu_weights_sm90 *call) {
  const mmadapt_swiglu_weights_sm90 &p = *call;
  const bool sizes = p.dim > 0 && p.rank > 0 && p.dz_experts >= 0 && p.h_experts >= 0;
  const swiglu_weights::Plan plan = sizes ? swiglu_weights::plan_of(p) : swiglu_weights::Plan{};
  const char *reason = swiglu_weights::refusal(p, plan);
  if (reason != nullptr) return bad_argument(reason);
  swiglu_weights::Arguments a = {};
  a.expert = p.expert;
  a.tokens = p.tokens;
  a.dim = p.dim;
  a.pair_columns = p.dz_experts * p.rank;
  a.up_columns = p.h_experts * p.rank;
  a.pair_blocks = plan.pair_blocks;
  a.up_blocks = plan.up_blocks;
  a.splits = plan.splits;
  a.tiles = static_cast<int32_t>(swiglu_weights::tiles_of(p.tokens));
  a.pair_parts = p.parts;
  a.up_parts = p.parts + int64_t(a.splits) * 2 * a.pair_columns * p.dim;
  const mmadapt_cuda_status status = swiglu_weights::fill_maps(a, p, plan.width);
  if (failed(status)) return status;
  return p.dtype == MMADAPT_BF16 ? swiglu_weights::launch_typed<__nv_bfloat16>(p, a, plan.width)
                                 : swiglu_weights::launch_typed<__half>(p, a, plan.width);
}
