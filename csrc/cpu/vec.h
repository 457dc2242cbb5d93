// Vectors of floats in gcc/clang vector extensions: one source for every instruction set.
//
// Included by sources that are compiled once per instruction set, so everything here has internal
// linkage: an inline function with external linkage would be merged by the linker across those
// objects, and a baseline machine could end up running its AVX-512 copy.
#pragma once

#include <cstdint>
#include <cstring>

#ifndef MMADAPT_VECTOR_BYTES
#define MMADAPT_VECTOR_BYTES 16
#endif

namespace {

constexpr int VL = MMADAPT_VECTOR_BYTES / 4;  // floats per vector

typedef float Vec __attribute__((vector_size(MMADAPT_VECTOR_BYTES)));
typedef int32_t IVec __attribute__((vector_size(MMADAPT_VECTOR_BYTES)));
typedef uint32_t UVec __attribute__((vector_size(MMADAPT_VECTOR_BYTES)));
typedef uint16_t HVec __attribute__((vector_size(MMADAPT_VECTOR_BYTES / 2)));
typedef float VecU __attribute__((vector_size(MMADAPT_VECTOR_BYTES), aligned(4), may_alias));
typedef uint16_t HVecU __attribute__((vector_size(MMADAPT_VECTOR_BYTES / 2), aligned(2), may_alias));

struct bf16 {
  uint16_t bits;
};

inline Vec broadcast(float s) { return s - Vec{}; }

inline float to_float(float v) { return v; }
inline float to_float(bf16 v) {
  uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

inline void from_float(float v, float *out) { *out = v; }
inline void from_float(float v, bf16 *out) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  // Round to nearest even; a NaN keeps its upper half, with a bit set so that it stays a NaN.
  out->bits = v != v ? static_cast<uint16_t>((bits >> 16) | 0x40)
                     : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline Vec load(const float *p) { return *reinterpret_cast<const VecU *>(p); }
inline Vec load(const bf16 *p) {
  HVec half = *reinterpret_cast<const HVecU *>(p);
  return (Vec)(__builtin_convertvector(half, UVec) << 16);
}

inline void store(float *p, Vec v) { *reinterpret_cast<VecU *>(p) = v; }
inline void store(bf16 *p, Vec v) {
  UVec bits = (UVec)v;
  UVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  UVec nan = (bits >> 16) | 0x40;
  *reinterpret_cast<HVecU *>(p) = __builtin_convertvector(v != v ? nan : rounded, HVec);
}

// v as the dtype of p would hold it.
inline Vec rounded_to(const float *, Vec v) { return v; }
inline Vec rounded_to(const bf16 *, Vec v) {
  bf16 buffer[VL];
  store(buffer, v);
  return load(buffer);
}

// First n (< VL) elements; the rest of the vector is zero.
template <class T>
inline Vec load_head(const T *p, int64_t n) {
  float buffer[VL] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = to_float(p[i]);
  return load(buffer);
}
template <class T>
inline void store_head(T *p, Vec v, int64_t n) {
  float buffer[VL];
  store(buffer, v);
  for (int64_t i = 0; i < n; ++i) from_float(buffer[i], p + i);
}

inline float sum(Vec v) {
  float buffer[VL];
  store(buffer, v);
  for (int width = VL / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) buffer[i] += buffer[i + width];
  return buffer[0];
}

// exp by range reduction to [-ln2/2, ln2/2] and a degree-6 polynomial (Cephes' expf coefficients);
// within 2 units in the last place. Arguments are clamped to where 2^n is a normal number.
inline Vec exp(Vec x) {
  const Vec high = broadcast(88.0f), low = broadcast(-87.0f);
  x = x > high ? high : x;  // written so that a NaN passes through
  x = x < low ? low : x;
  const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  Vec shifted = x * broadcast(1.44269504088896341f) + magic;
  Vec n = shifted - magic;
  Vec r = x - n * broadcast(0.693359375f);
  r = r - n * broadcast(-2.12194440e-4f);
  Vec p = broadcast(1.9875691500e-4f);
  p = p * r + broadcast(1.3981999507e-3f);
  p = p * r + broadcast(8.3334519073e-3f);
  p = p * r + broadcast(4.1665795894e-2f);
  p = p * r + broadcast(1.6666665459e-1f);
  p = p * r + broadcast(5.0000001201e-1f);
  p = p * r * r + r + broadcast(1.0f);
  IVec exponent = ((IVec)shifted << 23) + 0x3f800000;
  return p * (Vec)exponent;
}

inline Vec sigmoid(Vec x) { return broadcast(1.0f) / (broadcast(1.0f) + exp(-x)); }

}  // namespace
