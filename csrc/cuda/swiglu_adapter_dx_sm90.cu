// The gradient of the SwiGLU adapter's x on Hopper. The kernel: swiglu_adapter/kernel.cuh.
#include "swiglu_adapter/launch.cuh"

using namespace mmadapt;

extern "C" mmadapt_cuda_status mmadapt_swiglu_adapter_dx_cuda(const mmadapt_swiglu_adapter_dx_gpu *call) {
  const mmadapt_swiglu_adapter_gpu &p = call->problem;
  if (const char *reason = swiglu::refusal(p)) return bad_argument(reason);
  if (!aligned16(call->dy) || !aligned16(call->dx)) {
    return bad_argument("dy, dx: expected addresses at multiples of 16");
  }
  swiglu::Arguments a = swiglu::common(p);
  a.zg = const_cast<void *>(call->zg);  // the backward only reads what the forward writes
  a.zd = const_cast<void *>(call->zd);
  a.rstd = const_cast<float *>(call->rstd);
  a.dz = call->dz;
  a.h = call->h;
  a.dz_experts = call->dz_experts;
  a.h_experts = call->h_experts;
  return swiglu::launch_adapter<true>(a, p, {call->dy, call->dx});
}
