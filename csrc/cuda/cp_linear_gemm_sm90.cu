// The factored linear layer on Hopper: its GEMM with the cores given. Data flow: cp_linear/gemm_kernel.cuh.

#include "cp_linear/gemm_launch.cuh"

namespace mmadapt::cp_linear {
namespace {

template <class T, Major MAJOR>
mmadapt_cuda_status launch_major(Arguments &a, const mmadapt_cp_linear_gemm_sm90 &p, int tile) {
  if (tile == 128) return launch_gemm<T, 128, MAJOR, 0>(a, p);
  if (tile == 192) return launch_gemm<T, 192, MAJOR, 0>(a, p);
  return launch_gemm<T, 256, MAJOR, 0>(a, p);
}

template <class T>
mmadapt_cuda_status launch_type(Arguments &a, const mmadapt_cp_linear_gemm_sm90 &p, int tile) {
  return p.transposed ? launch_major<T, Major::N>(a, p, tile) : launch_major<T, Major::K>(a, p, tile);
}

}  // namespace
}  // namespace mmadapt::cp_linear

using namespace mmadapt;

extern "C" mmadapt_cuda_status mmadapt_cp_linear_gemm_cuda(const mmadapt_cp_linear_gemm_sm90 *call) {
  using namespace cp_linear;
  const mmadapt_cp_linear_gemm_sm90 &p = *call;
  if (const char *reason = gemm_refusal(p)) return bad_argument(reason);
  Arguments a = gemm_arguments(p);
  const int tile = tile_of(a, p);
  return p.dtype == MMADAPT_BF16 ? launch_type<__nv_bfloat16>(a, p, tile) : launch_type<__half>(a, p, tile);
}
