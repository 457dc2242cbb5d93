// Functions of the driver, found at run time: linking libcuda would keep the module from loading on
// machines without one.
#pragma once

#include <cuda_runtime.h>

namespace mmadapt {

// Sets `*function` to the driver's `symbol` (such as "cuTensorMapEncodeTiled") as of CUDA `version`
// (12000 = 12.0). The runtime caches nothing here: keep the result in a static.
template <class Function>
cudaError_t driver_function(const char *symbol, unsigned version, Function *function) {
  void *found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(symbol, &found, version, cudaEnableDefault, &result);
#else
  (void)version;
  const cudaError_t error = cudaGetDriverEntryPoint(symbol, &found, cudaEnableDefault, &result);
#endif
  if (error != cudaSuccess) {
    cudaGetLastError();
    return error;
  }
  if (result != cudaDriverEntryPointSuccess || found == nullptr) return cudaErrorSymbolNotFound;
  *function = reinterpret_cast<Function>(found);
  return cudaSuccess;
}

}  // namespace mmadapt
