// The factored linear layer on Hopper: z, the cores of a group of weights and y of the first, in one kernel
// (data flow: cp_linear/gemm_kernel.cuh, cp_linear/gemm_project.cuh) behind a tiny one that clears its flags.

#include "cp_linear/gemm_launch.cuh"

namespace mmadapt::cp_linear {
namespace {

// The kernel after this one may start beside it, and waits for it itself.
__global__ void __launch_bounds__(256) cp_linear_clear_kernel(uint32_t *words, int64_t count) {
  hopper::allow_next_kernel();
  const int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (i < count) words[i] = 0;
}

mmadapt_cuda_status clear_words(const mmadapt_cp_linear_fused_sm90 &p) {
  const int64_t count = projection_words(p.tokens);
  return launch({"cp_linear_clear_kernel", dim3(static_cast<unsigned>((count + 255) / 256)), dim3(256), 0,
                 p.stream},
                cp_linear_clear_kernel, static_cast<uint32_t *>(p.words), count);
}

// The same as a call of the GEMM with the cores given.
mmadapt_cp_linear_gemm_sm90 gemm_of(const mmadapt_cp_linear_fused_sm90 &p) {
  mmadapt_cp_linear_gemm_sm90 g = {};
  g.tokens = p.tokens;
  g.inner = p.inner;
  g.columns = p.columns;
  g.rank = g.core_columns = p.rank;
  g.count = 1;
  g.dtype = p.dtype;
  g.bias_dtype = p.bias_dtype;
  g.tile = p.tile;
  g.cluster = p.cluster;
  g.group = p.group;
  g.overlap = p.overlap;
  g.left[0] = p.x;
  g.right[0] = p.weight;
  g.core = p.core;
  g.factor = p.factor_out;
  g.bias = p.bias;
  g.y = p.y;
  g.stream = p.stream;
  return g;
}

const char *refusal(const mmadapt_cp_linear_fused_sm90 &p) {
  if (p.rank < 8) return "rank: expected 8 or more";
  for (const void *pointer : {p.x, p.weight, p.factor_in, p.factor_out, static_cast<const void *>(p.z),
                              static_cast<const void *>(p.core), static_cast<const void *>(p.y),
                              static_cast<const void *>(p.words)}) {
    if (!aligned16(pointer)) {
      return "x, weight, factor_in, factor_out, z, core, y, words: expected addresses at multiples of 16";
    }
  }
  if (const char *reason = gemm_refusal(gemm_of(p))) return reason;
  if (const char *reason = cores_refusal(p)) return reason;
  if (p.words_size < projection_words(p.tokens)) return "words_size: fewer than fused_words(tokens)";
  return nullptr;
}

template <class T, int RP>
mmadapt_cuda_status launch_ranks(Arguments &a, const mmadapt_cp_linear_gemm_sm90 &g, int tile,
                                 const void *factor_in) {
  if (tile == 128) return launch_gemm<T, 128, Major::K, RP>(a, g, factor_in);
  if (tile == 192) return launch_gemm<T, 192, Major::K, RP>(a, g, factor_in);
  return launch_gemm<T, 256, Major::K, RP>(a, g, factor_in);
}

template <class T>
mmadapt_cuda_status launch_type(Arguments &a, const mmadapt_cp_linear_gemm_sm90 &g, int tile,
                                const void *factor_in) {
  return padded_ranks(g.rank) == 64 ? launch_ranks<T, 64>(a, g, tile, factor_in)
                                    : launch_ranks<T, 128>(a, g, tile, factor_in);
}

}  // namespace
}  // namespace mmadapt::cp_linear

using namespace mmadapt;

extern "C" int64_t mmadapt_cp_linear_fused_words(int64_t tokens) {
  return cp_linear::projection_words(tokens);
}

extern "C" mmadapt_cp_linear_fused_plan mmadapt_cp_linear_plan_fused(int64_t tokens, int32_t columns,
                                                                     int32_t rank) {
  using namespace cp_linear;
  const int64_t row_tiles = (tokens + kRows - 1) / kRows;
  const int tile = choose_tile(row_tiles, columns, hopper::kMultiprocessors), cluster = row_tiles > 1 ? 2 : 1;
  const int64_t units = (row_tiles + cluster - 1) / cluster;
  const FusedPlan plan = plan_fused(static_cast<int>(units), units * ((columns + tile - 1) / tile),
                                    hopper::kMultiprocessors / cluster, tile, padded_ranks(rank));
  return {plan.units, plan.parcels, plan.hidden};
}

extern "C" mmadapt_cuda_status mmadapt_cp_linear_fused_cuda(const mmadapt_cp_linear_fused_sm90 *call) {
  using namespace cp_linear;
  const mmadapt_cp_linear_fused_sm90 &p = *call;
  if (const char *reason = refusal(p)) return bad_argument(reason);
  const mmadapt_cp_linear_gemm_sm90 g = gemm_of(p);
  Arguments a = gemm_arguments(g);
  a.projection.cores = cores_of(p);
  a.projection.counter = static_cast<uint32_t *>(p.words);
  a.projection.done = a.projection.counter + kCounterWords;
  const int tile = tile_of(a, g);
  const mmadapt_cuda_status status = clear_words(p);
  if (failed(status)) return status;
  return p.dtype == MMADAPT_BF16 ? launch_type<__nv_bfloat16>(a, g, tile, p.factor_in)
                                 : launch_type<__half>(a, g, tile, p.factor_in);
}
