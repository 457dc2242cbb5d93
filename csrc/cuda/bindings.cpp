// Python module mmadapt._C.cuda: one function per launcher.

#include "bindings.h"

#include "mmadapt/masked_rows.h"

namespace py = pybind11;

namespace mmadapt {

void register_cuda(py::module_ &parent) {
  py::module_ m = parent.def_submodule("cuda", "CUDA kernels of mmadapt: they queue and return.");

  using MaskedRows = mmadapt_masked_rows;
  define(m, "masked_rows", &mmadapt_masked_rows_cuda,  //
         field("tokens", &MaskedRows::tokens), field("mask", &MaskedRows::mask),
         field("rows", &MaskedRows::rows), field("count", &MaskedRows::count),
         field("stream", &MaskedRows::stream));
}

}  // namespace mmadapt
