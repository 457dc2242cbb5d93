// Python module mmadapt._C.cuda: one function per launcher.

#include "bindings.h"

#include <tuple>

#include "mmadapt/cp_linear_cuda.h"
#include "mmadapt/modality_gate.h"
#include "mmadapt/swiglu_adapter_cuda.h"
#include "mmadapt/swiglu_weights_cuda.h"

namespace py = pybind11;

namespace mmadapt {
namespace {

// An adapter's launcher: the sizes, `settings` of its tiles, the operands with the memory for packed weights
// under the name `packed`, and then the call's `own`.
template <class Call, class... Settings, class... Own>
void define_adapter(py::module_ &m, const char *name, mmadapt_cuda_status (*launcher)(const Call *),
                    const char *packed, std::tuple<Settings...> settings, Own... own) {
  using Problem = mmadapt_swiglu_adapter_gpu;
  const auto shared = [](const char *field_name, auto Problem::*member) {
    return nested(field_name, &Call::problem, member);
  };
  std::apply(
      [&](auto... setting) {
        define(m, name, launcher, shared("tokens", &Problem::tokens), shared("dim", &Problem::dim),
               shared("rank", &Problem::rank), shared("experts", &Problem::experts),
               shared("up_experts", &Problem::up_experts), shared("dtype", &Problem::dtype),
               shared("weight_dtype", &Problem::weight_dtype),
               shared("norm_dtype", &Problem::norm_dtype), shared("residual", &Problem::residual),
               shared("scale", &Problem::scale), shared("eps", &Problem::eps), setting...,
               shared("x", &Problem::x), shared("gate", &Problem::gate),
               shared("down", &Problem::down), shared("up", &Problem::up),
               shared("expert", &Problem::expert), shared("norm_weight", &Problem::norm_weight),
               shared(packed, &Problem::packed), shared("stream", &Problem::stream), own...);
      },
      settings);
}

// Forward and the gradient of x. `settings(problem)`: a tuple of the settings' fields, `problem` the member of
// the call that holds them.
template <class Settings>
void define_adapters(py::module_ &m, const char *forward_name, const char *dx_name,
                     mmadapt_cuda_status (*forward)(const mmadapt_swiglu_adapter_forward_gpu *),
                     mmadapt_cuda_status (*dx)(const mmadapt_swiglu_adapter_dx_gpu *),
                     const char *packed, Settings settings) {
  using Forward = mmadapt_swiglu_adapter_forward_gpu;
  define_adapter(m, forward_name, forward, packed, settings(&Forward::problem), field("y", &Forward::y),
                 field("zg", &Forward::zg), field("zd", &Forward::zd), field("rstd", &Forward::rstd));
  using Dx = mmadapt_swiglu_adapter_dx_gpu;
  define_adapter(m, dx_name, dx, packed, settings(&Dx::problem), field("dy", &Dx::dy),
                 field("zg", &Dx::zg), field("zd", &Dx::zd), field("rstd", &Dx::rstd),
                 field("dx", &Dx::dx), field("dz", &Dx::dz), field("h", &Dx::h),
                 field("dz_experts", &Dx::dz_experts), field("h_experts", &Dx::h_experts));
}

void define_portable_adapters(py::module_ &m) {
  using Problem = mmadapt_swiglu_adapter_gpu;
  define_adapters(m, "swiglu_adapter_portable_forward", "swiglu_adapter_portable_dx",
                  &mmadapt_swiglu_adapter_forward_portable_cuda,
                  &mmadapt_swiglu_adapter_dx_portable_cuda, "workspace", [](auto problem) {
                    return std::make_tuple(nested("stages", problem, &Problem::stages));
                  });
}

#ifdef MMADAPT_HAVE_SM90
void define_hopper_adapters(py::module_ &m) {
  using Problem = mmadapt_swiglu_adapter_gpu;
  define_adapters(m, "swiglu_adapter_forward", "swiglu_adapter_dx",
                  &mmadapt_swiglu_adapter_forward_cuda, &mmadapt_swiglu_adapter_dx_cuda, "packed",
                  [](auto problem) {
                    return std::make_tuple(nested("cluster", problem, &Problem::cluster),
                                           nested("rows", problem, &Problem::rows));
                  });
  m.def(
      "swiglu_adapter_plan",
      [](int dim, int rank, bool norm, bool backward, int cluster, int rows) {
        const auto p = mmadapt_swiglu_adapter_plan_sm90(dim, rank, norm, backward, cluster, rows);
        return py::make_tuple(p.stages, p.weight_stages, p.shared_bytes);
      },
      "(stages of rows, of weights, bytes of shared memory) of a block; zeros: does not fit.");
}

void define_cp_linears(py::module_ &m) {
  static_assert(MMADAPT_CP_LINEAR_MAX_GROUP == 8, "the names below");
  m.attr("CP_LINEAR_MAX_GROUP") = MMADAPT_CP_LINEAR_MAX_GROUP;
  using Project = mmadapt_cp_linear_project_sm90;
  const auto mode = &Project::mode;
  define(m, "cp_linear_project", &mmadapt_cp_linear_project_cuda, field("tokens", &Project::tokens),
         field("dim", &Project::dim), field("rank", &Project::rank), field("count", &Project::count),
         field("dtype", &Project::dtype), field("dense", &Project::dense),
         field("wide", &Project::wide), field("dropout", &Project::dropout),
         field("threshold", &Project::threshold), field("kept", &Project::kept),
         field("scale", &Project::scale), field("split", &Project::split), field("x", &Project::x),
         field("factor_in", &Project::factor_in), element("mode0", mode, 0), element("mode1", mode, 1),
         element("mode2", mode, 2), element("mode3", mode, 3), element("mode4", mode, 4),
         element("mode5", mode, 5), element("mode6", mode, 6), element("mode7", mode, 7),
         field("seeds", &Project::seeds), field("z", &Project::z), field("core", &Project::core),
         field("stream", &Project::stream));
  using Gemm = mmadapt_cp_linear_gemm_sm90;
  const auto left = &Gemm::left, right = &Gemm::right;
  define(m, "cp_linear_gemm", &mmadapt_cp_linear_gemm_cuda, field("tokens", &Gemm::tokens),
         field("inner", &Gemm::inner), field("columns", &Gemm::columns), field("rank", &Gemm::rank),
         field("core_columns", &Gemm::core_columns), field("count", &Gemm::count),
         field("dtype", &Gemm::dtype), field("bias_dtype", &Gemm::bias_dtype),
         field("transposed", &Gemm::transposed), field("tile", &Gemm::tile),
         field("cluster", &Gemm::cluster), field("group", &Gemm::group),
         field("overlap", &Gemm::overlap), element("left0", left, 0), element("left1", left, 1),
         element("left2", left, 2), element("left3", left, 3), element("left4", left, 4),
         element("left5", left, 5), element("left6", left, 6), element("left7", left, 7),
         element("right0", right, 0), element("right1", right, 1), element("right2", right, 2),
         element("right3", right, 3), element("right4", right, 4), element("right5", right, 5),
         element("right6", right, 6), element("right7", right, 7), field("core", &Gemm::core),
         field("factor", &Gemm::factor), field("bias", &Gemm::bias), field("y", &Gemm::y),
         field("stream", &Gemm::stream));
  using Fused = mmadapt_cp_linear_fused_sm90;
  const auto fused_mode = &Fused::mode;
  define(m, "cp_linear_fused", &mmadapt_cp_linear_fused_cuda, field("tokens", &Fused::tokens),
         field("inner", &Fused::inner), field("columns", &Fused::columns), field("rank", &Fused::rank),
         field("count", &Fused::count), field("dtype", &Fused::dtype),
         field("bias_dtype", &Fused::bias_dtype), field("wide", &Fused::wide),
         field("dropout", &Fused::dropout), field("threshold", &Fused::threshold),
         field("kept", &Fused::kept), field("scale", &Fused::scale), field("tile", &Fused::tile),
         field("cluster", &Fused::cluster), field("group", &Fused::group),
         field("overlap", &Fused::overlap), field("x", &Fused::x), field("weight", &Fused::weight),
         field("factor_in", &Fused::factor_in), field("factor_out", &Fused::factor_out),
         field("bias", &Fused::bias), element("mode0", fused_mode, 0), element("mode1", fused_mode, 1),
         element("mode2", fused_mode, 2), element("mode3", fused_mode, 3), element("mode4", fused_mode, 4),
         element("mode5", fused_mode, 5), element("mode6", fused_mode, 6), element("mode7", fused_mode, 7),
         field("seeds", &Fused::seeds), field("z", &Fused::z), field("core", &Fused::core),
         field("y", &Fused::y), field("words", &Fused::words), field("words_size", &Fused::words_size),
         field("stream", &Fused::stream));
  m.def("cp_linear_fused_words", &mmadapt_cp_linear_fused_words, py::arg("tokens"));
  m.def(
      "cp_linear_plan_fused",
      [](int64_t tokens, int32_t columns, int32_t rank) {
        const auto plan = mmadapt_cp_linear_plan_fused(tokens, columns, rank);
        return py::make_tuple(plan.units, plan.parcels, plan.hidden != 0);
      },
      py::arg("tokens"), py::arg("columns"), py::arg("rank"),
      "Units of rows, parcels in which clusters take them, and whether that is in idle time.");
  using Pack = mmadapt_cp_linear_pack_sm90;
  define(m, "cp_linear_pack", &mmadapt_cp_linear_pack_cuda, field("first_size", &Pack::first_size),
         field("second_size", &Pack::second_size), field("dtype", &Pack::dtype),
         field("first", &Pack::first), field("second", &Pack::second),
         field("first_out", &Pack::first_out), field("second_out", &Pack::second_out),
         field("stream", &Pack::stream));
}
#endif

}  // namespace

void register_cuda(py::module_ &parent) {
  py::module_ m = parent.def_submodule("cuda", "CUDA kernels of mmadapt: they queue and return.");

#ifdef MMADAPT_HAVE_SM90
  define_hopper_adapters(m);
  define_cp_linears(m);
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

#ifdef MMADAPT_HAVE_SM90
  using Weights = mmadapt_swiglu_weights_sm90;
  define(m, "swiglu_adapter_weights", &mmadapt_swiglu_weights_cuda,  //
         field("tokens", &Weights::tokens), field("dim", &Weights::dim),
         field("rank", &Weights::rank), field("dz_experts", &Weights::dz_experts),
         field("h_experts", &Weights::h_experts), field("dtype", &Weights::dtype),
         field("weight_dtype", &Weights::weight_dtype), field("norm_dtype", &Weights::norm_dtype),
         field("x", &Weights::x), field("dy", &Weights::dy),
         field("dz", &Weights::dz), field("h", &Weights::h), field("expert", &Weights::expert),
         field("norm_weight", &Weights::norm_weight), field("gate", &Weights::gate),
         field("down", &Weights::down), field("sums", &Weights::sums),
         field("count_sums", &Weights::count_sums), field("parts", &Weights::parts),
         field("dgate", &Weights::dgate), field("ddown", &Weights::ddown),
         field("dup", &Weights::dup), field("dnorm", &Weights::dnorm),
         field("stream", &Weights::stream));
  m.def(
      "swiglu_adapter_weights_plan",
      [](int64_t tokens, int dim, int dz_columns, int h_columns) {
        const auto p = mmadapt_swiglu_weights_plan_sm90(tokens, dim, dz_columns, h_columns);
        return py::make_tuple(p.width, p.pair_blocks, p.up_blocks, p.splits, p.parts);
      },
      "(width, blocks over the columns of x, of dy, splits, floats of parts); width 0: unsupported.");
#endif

  define_portable_adapters(m);
}

}  // namespace mmadapt
