// Python module mmadapt._C: plain pointers in, errors out. Shapes and dtypes are checked in Python.

#include <pybind11/pybind11.h>

#include <stdexcept>

#include "mmadapt/swiglu_adapter.h"

namespace py = pybind11;

#ifdef MMADAPT_HAVE_CUDA
namespace mmadapt {
void register_cuda(py::module_ &parent);  // cuda/bindings.cpp
}
#endif

namespace {

template <class T>
T *pointer(uintptr_t address) {
  return reinterpret_cast<T *>(address);
}

void check(mmadapt_status status) {
  switch (status) {
    case MMADAPT_OK:
      return;
    case MMADAPT_OUT_OF_MEMORY:
      throw std::bad_alloc();
    case MMADAPT_EXPERT_OUT_OF_RANGE:
      throw py::value_error("expert: holds a value outside -1..number of experts - 1");
    case MMADAPT_BAD_ARGUMENT:
      throw py::value_error("swiglu_adapter: a size is out of range");
    case MMADAPT_CUDA_ERROR:  // not from CPU kernels
      break;
  }
}

// The arguments shared by forward and backward, in the order of the tuple that Python passes.
mmadapt_swiglu_adapter make_problem(
    const std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t> &sizes,
    const std::tuple<int32_t, int32_t, int32_t> &dtypes,
    const std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t> &inputs,
    int32_t residual, float scale, float eps, int32_t threads) {
  mmadapt_swiglu_adapter p = {};
  std::tie(p.tokens, p.dim, p.rank, p.experts, p.up_experts) = sizes;
  std::tie(p.activation_dtype, p.weight_dtype, p.norm_dtype) = dtypes;
  p.x = pointer<void>(std::get<0>(inputs));
  p.gate = pointer<void>(std::get<1>(inputs));
  p.down = pointer<void>(std::get<2>(inputs));
  p.up = pointer<void>(std::get<3>(inputs));
  p.expert = pointer<int32_t>(std::get<4>(inputs));
  p.norm_weight = pointer<void>(std::get<5>(inputs));
  p.residual = residual;
  p.scale = scale;
  p.eps = eps;
  p.threads = threads;
  return p;
}

void forward(const mmadapt_swiglu_adapter &problem, uintptr_t y, uintptr_t zg, uintptr_t zd,
             uintptr_t rstd) {
  const mmadapt_swiglu_adapter_outputs outputs = {pointer<void>(y), pointer<void>(zg),
                                                  pointer<void>(zd), pointer<float>(rstd)};
  mmadapt_status status;
  {
    py::gil_scoped_release release;
    status = mmadapt_swiglu_adapter_forward(&problem, &outputs);
  }
  check(status);
}

void backward(const mmadapt_swiglu_adapter &problem, uintptr_t dy, uintptr_t zg, uintptr_t zd,
              uintptr_t rstd, uintptr_t dx, uintptr_t dgate, uintptr_t ddown, uintptr_t dup,
              uintptr_t dnorm) {
  const mmadapt_swiglu_adapter_gradients gradients = {
      pointer<void>(dy),    pointer<void>(zg),    pointer<void>(zd),
      pointer<float>(rstd), pointer<void>(dx),    pointer<void>(dgate),
      pointer<void>(ddown), pointer<void>(dup),   pointer<void>(dnorm)};
  mmadapt_status status;
  {
    py::gil_scoped_release release;
    status = mmadapt_swiglu_adapter_backward(&problem, &gradients);
  }
  check(status);
}

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
#ifdef _OPENMP
  info["openmp"] = "yes, " + std::to_string(_OPENMP);
#else
  info["openmp"] = "no: one thread";
#endif
  info["isa"] = mmadapt_cpu_isa();
  info["isa_compiled"] = mmadapt_cpu_isa_compiled();
#ifdef MMADAPT_HAVE_CUDA
  info["cuda_archs"] = MMADAPT_CUDA_ARCHS;
  info["nvcc"] = MMADAPT_NVCC_VERSION;
#else
  info["cuda_absent"] = MMADAPT_CUDA_ABSENT;
#endif
  info["source_hash"] = MMADAPT_SOURCE_HASH;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of mmadapt; addresses are integers, 0 = absent.";
  m.attr("F32") = static_cast<int>(MMADAPT_F32);
  m.attr("BF16") = static_cast<int>(MMADAPT_BF16);
  m.attr("F16") = static_cast<int>(MMADAPT_F16);
  m.attr("RESIDUAL_NONE") = static_cast<int>(MMADAPT_RESIDUAL_NONE);
  m.attr("RESIDUAL_INPUT") = static_cast<int>(MMADAPT_RESIDUAL_INPUT);
  m.attr("RESIDUAL_NORM") = static_cast<int>(MMADAPT_RESIDUAL_NORM);
  m.def("build_info", &build_info);
  py::class_<mmadapt_swiglu_adapter>(m, "SwigluAdapter")
      .def(py::init(&make_problem), py::kw_only(), py::arg("sizes"), py::arg("dtypes"),
           py::arg("inputs"), py::arg("residual"), py::arg("scale"), py::arg("eps"),
           py::arg("threads"));
  m.def("swiglu_adapter_forward", &forward);
  m.def("swiglu_adapter_backward", &backward);
#ifdef MMADAPT_HAVE_CUDA
  mmadapt::register_cuda(m);
#endif
}
