// The SwiGLU adapter's forward on Hopper. The kernel: swiglu_adapter/kernel.cuh.
#include "swiglu_adapter/launch.cuh"

using namespace mmadapt;

extern "C" mmadapt_cuda_status mmadapt_swiglu_adapter_forward_cuda(
    const mmadapt_swiglu_adapter_forward_gpu *call) {
  const mmadapt_swiglu_adapter_gpu &p = call->problem;
  if (const char *reason = swiglu::refusal(p)) return bad_argument(reason);
  if (!aligned16(call->y)) return bad_argument("y: expected an address at a multiple of 16");
  swiglu::Arguments a = swiglu::common(p);
  a.zg = call->zg;
  a.zd = call->zd;
  a.rstd = call->rstd;
  return swiglu::launch_adapter<false>(a, p, {p.x, call->y});
}

namespace mmadapt::swiglu {
namespace {

template <class S>
mmadapt_swiglu_adapter_plan plan_of(int dim, int cluster, bool norm, int rows) {
  if (rows != S::kRows) return {0, 0, 0};
  const Plan p = make_plan<S>(dim, cluster, norm ? Norm::kColumns : Norm::kNone);
  return {p.stages, p.weight_stages, static_cast<int32_t>(p.bytes)};
}

template <int MP, bool BACKWARD>
mmadapt_swiglu_adapter_plan plan_of_rank(int dim, int cluster, bool norm, int rows) {
  if constexpr (halves(MP) == 1) {
    if (rows == 256) return plan_of<Shape<MP, BACKWARD, 1, false>>(dim, cluster, norm, rows);
  }
  if (rows == 128) return plan_of<Shape<MP, BACKWARD, 2, false>>(dim, cluster, norm, rows);
  return plan_of<Shape<MP, BACKWARD, 4, false>>(dim, cluster, norm, rows);
}

template <bool BACKWARD>
mmadapt_swiglu_adapter_plan plan_of_direction(int dim, int rank, bool norm, int cluster, int rows) {
  if (rank <= 32) return plan_of_rank<32, BACKWARD>(dim, cluster, norm, rows);
  if (rank <= 64) return plan_of_rank<64, BACKWARD>(dim, cluster, norm, rows);
  return plan_of_rank<128, BACKWARD>(dim, cluster, norm, rows);
}

}  // namespace
}  // namespace mmadapt::swiglu

extern "C" mmadapt_swiglu_adapter_plan mmadapt_swiglu_adapter_plan_sm90(int32_t dim, int32_t rank,
                                                                        int32_t norm, int32_t backward,
                                                                        int32_t cluster, int32_t rows) {
  if (cluster < 2) return {0, 0, 0};
  return backward != 0 ? swiglu::plan_of_direction<true>(dim, rank, norm != 0, cluster, rows)
                       : swiglu::plan_of_direction<false>(dim, rank, norm != 0, cluster, rows);
}
