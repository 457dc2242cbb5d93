// What the kernels and their launchers use of CUDA's runtime and built-in functions.
#pragma once

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "cuda.h"
#include "machine.h"

#define __device__
#define __host__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n)
#define __grid_constant__

using std::max;
using std::min;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

// Errors and launches.

enum cudaError_t {
  cudaSuccess, cudaErrorInvalidValue, cudaErrorInsufficientDriver, cudaErrorNoDevice, cudaErrorSymbolNotFound,
  cudaErrorLaunchFailure
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension, cudaLaunchAttributeProgrammaticStreamSerialization };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess, cudaDriverEntryPointSymbolNotFound };
enum cudaDriverFlags { cudaEnableDefault };
using cudaStream_t = void *;
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct { unsigned x, y, z; } clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute *attrs = nullptr;
  int numAttrs = 0;
};

inline cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) { return cudaSuccess; }
// One cluster at a time: it takes all tiles, one after another.
inline cudaError_t cudaOccupancyMaxActiveClusters(int *count, const void *, const cudaLaunchConfig_t *) {
  return *count = 1, cudaSuccess;
}
inline cudaError_t cudaGetDriverEntryPoint(const char *symbol, void **found, cudaDriverFlags,
                                           cudaDriverEntryPointQueryResult *result) {
  if (std::strcmp(symbol, "cuTensorMapEncodeTiled") != 0) return cudaErrorSymbolNotFound;
  *found = reinterpret_cast<void *>(&encode_tensor_map);
  return *result = cudaDriverEntryPointSuccess, cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(Parameters...),
                               Arguments &&...arguments) {
  unsigned cluster = 0;
  for (int i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) cluster = config->attrs[i].val.clusterDim.x;
  }
  const bool done = machine::run(config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes, cluster,
                                 [&] { kernel(arguments...); });
  return done ? cudaSuccess : cudaErrorLaunchFailure;
}

// Warps and blocks.

template <class Number>
machine::Slot to_slot(Number v) {
  machine::Slot slot = {};
  std::memcpy(&slot, &v, sizeof(v));
  return slot;
}
template <class Number>
Number from_slot(const machine::Slot &slot) {
  Number v;
  std::memcpy(&v, &slot, sizeof(v));
  return v;
}
template <class Number>
machine::Slot *shuffle(Number v) { return machine::together(machine::Together::kShuffle, 0, to_slot(v)); }

template <class Number>
Number __shfl_sync(unsigned, Number v, int from) { return from_slot<Number>(shuffle(v)[from & 31]); }
template <class Number>
Number __shfl_xor_sync(unsigned, Number v, int mask) { return from_slot<Number>(shuffle(v)[machine::lane() ^ mask]); }
template <class Number, class Combine>
Number reduce(Number v, Combine combine) {
  const machine::Slot *all = shuffle(v);
  Number result = v;
  for (int i = 0; i < 32; ++i) result = combine(result, from_slot<Number>(all[i]));
  return result;
}
inline int __reduce_min_sync(unsigned, int v) { return reduce(v, [](int a, int b) { return min(a, b); }); }
inline int __reduce_max_sync(unsigned, int v) { return reduce(v, [](int a, int b) { return max(a, b); }); }
inline bool __all_sync(unsigned, bool v) { return reduce(v, [](bool a, bool b) { return a && b; }); }
inline void __syncwarp() { machine::together(machine::Together::kSyncWarp, 0, {}); }
inline void __syncthreads() { machine::named_barrier(0, blockDim.x); }

// Numbers.

template <class T>
T __ldg(const T *p) { return *p; }
inline float __uint_as_float(uint32_t v) { return from_slot<float>(to_slot(v)); }
inline uint32_t __float_as_uint(float v) { return from_slot<uint32_t>(to_slot(v)); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline int __clz(int x) { return __builtin_clz(x); }
