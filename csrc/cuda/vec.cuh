// Vectors of V numbers that move as one access of up to 16 bytes, and the choice of types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "launch.cuh"
#include "store_word.cuh"

namespace mmadapt {

constexpr unsigned kWholeWarp = 0xffffffffu;

template <class T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Vec {
  T at[V];
};

// Integers of the size of a vector's accesses. With them, and stores written out, a vector moves as
// one: left to itself the compiler takes some apart and stores their numbers one by one.
template <int kBytes>
struct Words {
  using type = uint4;
};
template <>
struct Words<8> {
  using type = uint2;
};
template <>
struct Words<4> {
  using type = uint32_t;
};
template <>
struct Words<2> {
  using type = uint16_t;
};

template <class T, int V>
__device__ __forceinline__ Vec<T, V> load(const T *from) {
  using Word = typename Words<sizeof(T) * V>::type;
  Vec<T, V> vec;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(vec) / sizeof(Word)); ++i) {
    const Word word = reinterpret_cast<const Word *>(from)[i];
    __builtin_memcpy(reinterpret_cast<char *>(&vec) + i * sizeof(Word), &word, sizeof(Word));
  }
  return vec;
}

// `to`: in global memory.
template <class T, int V>
__device__ __forceinline__ void store(T *to, const Vec<T, V> &vec) {
  using Word = typename Words<sizeof(T) * V>::type;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(vec) / sizeof(Word)); ++i) {
    Word word;
    __builtin_memcpy(&word, reinterpret_cast<const char *>(&vec) + i * sizeof(Word), sizeof(Word));
    store_word(reinterpret_cast<Word *>(to) + i, word);
  }
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
