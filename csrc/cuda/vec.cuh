// Vectors of V numbers that move as one access of up to 16 bytes, and the choice of types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "launch.cuh"

namespace mmadapt {

template <class T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Vec {
  T at[V];
};

template <class T, int V>
__device__ __forceinline__ Vec<T, V> load(const T *from) {
  return *reinterpret_cast<const Vec<T, V> *>(from);
}

template <class T, int V>
__device__ __forceinline__ void store(T *to, const Vec<T, V> &vec) {
  *reinterpret_cast<Vec<T, V> *>(to) = vec;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// Numbers of T in 16 bytes.
template <class T>
constexpr int kWide = 16 / sizeof(T);

inline bool aligned16(const void *p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class T>
struct Type {
  using type = T;
};

// call(Type<T>{}) with T of an mmadapt_dtype.
template <class Call>
mmadapt_cuda_status with_type(int32_t dtype, const char *argument, Call call) {
  switch (dtype) {
    case MMADAPT_F32:
      return call(Type<float>{});
    case MMADAPT_BF16:
      return call(Type<__nv_bfloat16>{});
    case MMADAPT_F16:
      return call(Type<__half>{});
    default:
      return bad_argument(argument);
  }
}

// call(Type<T>{}, Type<W>{}): activations of `dtype`, parameters of the same or fp32.
template <class Call>
mmadapt_cuda_status with_types(int32_t dtype, int32_t parameter_dtype, Call call) {
  return with_type(dtype, "dtype: expected F32, BF16 or F16", [&](auto t) {
    using T = typename decltype(t)::type;
    if (parameter_dtype == dtype) return call(Type<T>{}, Type<T>{});
    if (parameter_dtype == MMADAPT_F32) return call(Type<T>{}, Type<float>{});
    return bad_argument("parameter dtype: expected that of the activations or F32");
  });
}

}  // namespace mmadapt
