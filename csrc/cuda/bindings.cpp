// Python module mmadapt._C.cuda: one function per launcher.

#include "bindings.h"

#include "mmadapt/modality_gate.h"
#include "mmadapt/swiglu_adapter_cuda.h"
#include "mmadapt/swiglu_adapter_portable.h"

namespace py = pybind11;

namespace mmadapt {
namespace {

#ifdef MMADAPT_HAVE_SM90
// The members of `Call::problem`, which every call has, and then `own`.
template <class Call, class... Own>
void define_adapter(py::module_ &m, const char *name, mmadapt_cuda_status (*launcher)(const Call *),
                    Own... own) {
  using Problem = mmadapt_swiglu_adapter_sm90;
  const auto shared = [](const char *field_name, auto Problem::*member) {
    return nested(field_name, &Call::problem, member);
  };
  define(m, name, launcher, shared("tokens", &Problem::tokens), shared("dim", &Problem::dim),
         shared("rank", &Problem::rank), shared("experts", &Problem::experts),
         shared("up_experts", &Problem::up_experts), shared("dtype", &Problem::dtype),
         shared("weight_dtype", &Problem::weight_dtype), shared("norm_dtype", &Problem::norm_dtype),
         shared("residual", &Problem::residual), shared("scale", &Problem::scale),
         shared("eps", &Problem::eps), shared("cluster", &Problem::cluster),
         shared("x", &Problem::x), shared("gate", &Problem::gate), shared("down", &Problem::down),
         shared("up", &Problem::up), shared("expert", &Problem::expert),
         shared("norm_weight", &Problem::norm_weight), shared("stream", &Problem::stream), own...);
}

void define_adapters(py::module_ &m) {
  using Forward = mmadapt_swiglu_adapter_forward_sm90;
  define_adapter(m, "swiglu_adapter_forward", &mmadapt_swiglu_adapter_forward_cuda,
                 field("y", &Forward::y), field("zg", &Forward::zg), field("zd", &Forward::zd),
                 field("rstd", &Forward::rstd));
  using Dx = mmadapt_swiglu_adapter_dx_sm90;
  define_adapter(m, "swiglu_adapter_dx", &mmadapt_swiglu_adapter_dx_cuda, field("dy", &Dx::dy),
                 field("zg", &Dx::zg), field("zd", &Dx::zd), field("rstd", &Dx::rstd),
                 field("dx", &Dx::dx), field("dz", &Dx::dz), field("h", &Dx::h),
                 field("dz_experts", &Dx::dz_experts), field("h_experts", &Dx::h_experts));
  m.def(
      "swiglu_adapter_plan",
      [](int dim, int rank, int experts, int up_experts, bool norm, bool backward) {
        const auto p = mmadapt_swiglu_adapter_plan_sm90(dim, rank, experts, up_experts, norm, backward);
        return py::make_tuple(p.cluster, p.columns, p.warpgroups, p.buffers, p.shared_bytes);
      },
      "(cluster, columns, warpgroups, buffers, shared bytes); cluster 0: does not fit.");
}
#endif

// The members of `Call::problem`, which both calls have, and then `own`.
template <class Call, class... Own>
void define_portable_adapter(py::module_ &m, const char *name,
                             mmadapt_cuda_status (*launcher)(const Call *), Own... own) {
  using Problem = mmadapt_swiglu_adapter_portable;
  const auto shared = [](const char *field_name, auto Problem::*member) {
    return nested(field_name, &Call::problem, member);
  };
  define(m, name, launcher, shared("tokens", &Problem::tokens), shared("dim", &Problem::dim),
         shared("rank", &Problem::rank), shared("experts", &Problem::experts),
         shared("up_experts", &Problem::up_experts), shared("dtype", &Problem::dtype),
         shared("weight_dtype", &Problem::weight_dtype), shared("norm_dtype", &Problem::norm_dtype),
         shared("residual", &Problem::residual), shared("scale", &Problem::scale),
         shared("eps", &Problem::eps), shared("stages", &Problem::stages), shared("x", &Problem::x),
         shared("gate", &Problem::gate), shared("down", &Problem::down), shared("up", &Problem::up),
         shared("expert", &Problem::expert), shared("norm_weight", &Problem::norm_weight),
         shared("workspace", &Problem::workspace), shared("stream", &Problem::stream), own...);
}

}  // namespace

void register_cuda(py::module_ &parent) {
  py::module_ m = parent.def_submodule("cuda", "CUDA kernels of mmadapt: they queue and return.");

#ifdef MMADAPT_HAVE_SM90
  define_adapters(m);
#endif

  using GateForward = mmadapt_modality_gate_forward;
  define(m, "modality_gate_forward", &mmadapt_modality_gate_forward_cuda,  //
         field("tokens", &GateForward::tokens), field("heads", &GateForward::heads),
         field("size", &GateForward::size), field("dtype", &GateForward::dtype),
         field("logits_dtype", &GateForward::logits_dtype),
         field("per_token", &GateForward::per_token), field("value", &GateForward::value),
         field("logits", &GateForward::logits), field("mask", &GateForward::mask),
         field("y", &GateForward::y), field("saved", &GateForward::saved),
         field("stream", &GateForward::stream));

  using GateBackward = mmadapt_modality_gate_backward;
  define(m, "modality_gate_backward", &mmadapt_modality_gate_backward_cuda,  //
         field("tokens", &GateBackward::tokens), field("heads", &GateBackward::heads),
         field("size", &GateBackward::size), field("part_tokens", &GateBackward::part_tokens),
         field("dtype", &GateBackward::dtype), field("logits_dtype", &GateBackward::logits_dtype),
         field("per_token", &GateBackward::per_token), field("dy", &GateBackward::dy),
         field("value", &GateBackward::value), field("logits", &GateBackward::logits),
         field("mask", &GateBackward::mask), field("dvalue", &GateBackward::dvalue),
         field("dlogits", &GateBackward::dlogits), field("parts", &GateBackward::parts),
         field("stream", &GateBackward::stream));

  using ProjectedForward = mmadapt_projected_modality_gate_forward;
  define(m, "projected_modality_gate_forward", &mmadapt_projected_modality_gate_forward_cuda,  //
         field("tokens", &ProjectedForward::tokens), field("heads", &ProjectedForward::heads),
         field("size", &ProjectedForward::size), field("width", &ProjectedForward::width),
         field("dtype", &ProjectedForward::dtype),
         field("weight_dtype", &ProjectedForward::weight_dtype),
         field("value", &ProjectedForward::value), field("hidden", &ProjectedForward::hidden),
         field("weight", &ProjectedForward::weight), field("mask", &ProjectedForward::mask),
         field("y", &ProjectedForward::y), field("gate", &ProjectedForward::gate),
         field("saved", &ProjectedForward::saved), field("stream", &ProjectedForward::stream));

  using ProjectedBackward = mmadapt_projected_modality_gate_backward;
  define(m, "projected_modality_gate_backward", &mmadapt_projected_modality_gate_backward_cuda,  //
         field("tokens", &ProjectedBackward::tokens), field("heads", &ProjectedBackward::heads),
         field("size", &ProjectedBackward::size), field("width", &ProjectedBackward::width),
         field("dtype", &ProjectedBackward::dtype),
         field("weight_dtype", &ProjectedBackward::weight_dtype),
         field("dy", &ProjectedBackward::dy), field("value", &ProjectedBackward::value),
         field("hidden", &ProjectedBackward::hidden), field("weight", &ProjectedBackward::weight),
         field("mask", &ProjectedBackward::mask), field("gate", &ProjectedBackward::gate),
         field("dlogits", &ProjectedBackward::dlogits),
         field("dvalue", &ProjectedBackward::dvalue),
         field("dhidden", &ProjectedBackward::dhidden),
         field("dweight", &ProjectedBackward::dweight),
         field("stream", &ProjectedBackward::stream));

  using PortableForward = mmadapt_swiglu_adapter_forward_portable;
  define_portable_adapter(m, "swiglu_adapter_portable_forward",
                          &mmadapt_swiglu_adapter_forward_portable_cuda,
                          field("y", &PortableForward::y), field("zg", &PortableForward::zg),
                          field("zd", &PortableForward::zd), field("rstd", &PortableForward::rstd));

  using PortableDx = mmadapt_swiglu_adapter_dx_portable;
  define_portable_adapter(m, "swiglu_adapter_portable_dx", &mmadapt_swiglu_adapter_dx_portable_cuda,
                          field("dy", &PortableDx::dy), field("zg", &PortableDx::zg),
                          field("zd", &PortableDx::zd), field("rstd", &PortableDx::rstd),
                          field("dx", &PortableDx::dx), field("dz", &PortableDx::dz),
                          field("h", &PortableDx::h), field("dz_experts", &PortableDx::dz_experts),
                          field("h_experts", &PortableDx::h_experts));
}

}  // namespace mmadapt
