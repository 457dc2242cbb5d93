// The SwiGLU adapter's forward on Hopper. The kernel: swiglu_adapter/kernel.cuh.
#include "swiglu_adapter/launch.cuh"

using namespace mmadapt;

extern "C" mmadapt_cuda_status mmadapt_swiglu_adapter_forward_cuda(
    const mmadapt_swiglu_adapter_forward_sm90 *call) {
  const mmadapt_swiglu_adapter_sm90 &p = call->problem;
  if (const char *reason = swiglu::refusal(p)) return bad_argument(reason);
  if (!aligned16(call->y)) return bad_argument("y: expected an address at a multiple of 16");
  swiglu::Arguments a = swiglu::common(p);
  a.zg = call->zg;
  a.zd = call->zd;
  a.rstd = call->rstd;
  return swiglu::launch_adapter<false>(a, p, {p.x, call->y});
}
