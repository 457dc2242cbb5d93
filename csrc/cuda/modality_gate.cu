// The value gate with given logits.
//
//     y[t, h, :]      = value[t, h, :] * g[t, h]                     where mask[t], else value
//     dvalue[t, h, :] = dy[t, h, :] * g[t, h]                        where mask[t], else dy
//     dlogits[t, h]   = (1 - g^2) sum_c dy[t, h, c] value[t, h, c]   where mask[t], else 0
//
// with g = tanh(logits); logits [heads] sum dlogits over tokens. One warp per row: a warp whose row
// is not masked copies it, or in place is done at once, so that the cost follows the masked rows
// without a list of them.

#include "gate_rows.cuh"
#include "mmadapt/modality_gate.h"
#include "ordered_sum.cuh"

namespace mmadapt {
namespace {

template <class T, class L, int V>
__global__ void __launch_bounds__(kRowThreads)
    forward_kernel(const T *value, const L *__restrict__ logits, const uint8_t *__restrict__ mask,
                   T *y, T *saved, int32_t tokens, int32_t heads, int32_t per_head,
                   bool per_token) {
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / 32;
  if (row >= tokens) return;
  const int vectors = heads * per_head;
  const int64_t start = row * vectors * V;
  if (mask[row] != 0) {
    const L *own = per_token ? logits + row * heads : logits;
    gate_row<T, V>(value + start, y + start, saved == nullptr ? nullptr : saved + start, vectors,
                   per_head, lane, [=](int head) { return tanhf(to_float(own[head])); });
  } else if (y != value) {
    copy_row<T, V>(value + start, y + start, vectors, lane);
  }
}

// A block owns `part_tokens` rows, eight at a time. `parts`: its sum of dlogits; null with
// per_token, where `dlogits` is written at once, and where neither is needed.
template <class T, class L, int V>
__global__ void __launch_bounds__(kRowThreads, 2)
    backward_kernel(const T *__restrict__ dy, const T *__restrict__ value,
                    const L *__restrict__ logits, const uint8_t *__restrict__ mask,
                    T *__restrict__ dvalue, L *__restrict__ dlogits, float *__restrict__ parts,
                    int32_t tokens, int32_t part_tokens, int32_t heads, int32_t per_head,
                    bool per_token) {
  extern __shared__ float shared[];
  float *eight = shared;                      // [kRowWarps, heads]: gates, then dlogits
  float *total = shared + kRowWarps * heads;  // [heads], with parts
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int vectors = heads * per_head;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * part_tokens;
  const int64_t last = min(first + part_tokens, static_cast<int64_t>(tokens));
  float *own = eight + warp * heads;
  if (parts != nullptr) {
    for (int h = threadIdx.x; h < heads; h += kRowThreads) total[h] = 0.f;
  }
  for (int64_t base = first; base < last; base += kRowWarps) {
    const int64_t row = base + warp;
    const bool inside = row < last, masked = inside && mask[row] != 0;
    const int64_t start = row * vectors * V;
    if (masked) {
      const L *logit = per_token ? logits + row * heads : logits;
      for (int h = lane; h < heads; h += 32) own[h] = tanhf(to_float(logit[h]));
      __syncwarp();
      const bool need_logits = parts != nullptr || dlogits != nullptr;
      backward_row<T, V>(dy + start, need_logits ? value + start : nullptr,
                         dvalue == nullptr ? nullptr : dvalue + start, heads, per_head, lane,
                         [=](int head) { return own[head]; },
                         [=](int head, float through) {
                           const float g = own[head], dlogit = through * (1.f - g * g);
                           if (parts != nullptr) {
                             own[head] = dlogit;
                           } else {
                             dlogits[row * heads + head] = from_float<L>(dlogit);
                           }
                         });
      __syncwarp();  // the next row's gates go where this one's were read
    } else {
      if (inside && dvalue != nullptr) copy_row<T, V>(dy + start, dvalue + start, vectors, lane);
      for (int h = lane; h < heads; h += 32) {
        if (parts != nullptr) {
          own[h] = 0.f;
        } else if (inside && dlogits != nullptr) {
          dlogits[row * heads + h] = from_float<L>(0.f);
        }
      }
    }
    if (parts != nullptr) {
      __syncthreads();
      for (int h = threadIdx.x; h < heads; h += kRowThreads) {
        float sum = total[h];
#pragma unroll
        for (int w = 0; w < kRowWarps; ++w) sum += eight[w * heads + h];
        total[h] = sum;
      }
      __syncthreads();
    }
  }
  if (parts != nullptr) {  // each entry is read by the thread that wrote it
    for (int h = threadIdx.x; h < heads; h += kRowThreads) {
      parts[static_cast<int64_t>(blockIdx.x) * heads + h] = total[h];
    }
  }
}

}  // namespace
}  // namespace mmadapt

extern "C" mmadapt_cuda_status mmadapt_modality_gate_forward_cuda(
    const mmadapt_modality_gate_forward *problem) {
  using namespace mmadapt;
  const mmadapt_modality_gate_forward &p = *problem;
  if (p.tokens < 0 || p.tokens > INT32_MAX) return bad_argument("tokens: expected 0 to 2^31 - 1");
  if (p.heads < 0 || p.size < 0 || p.heads * p.size > INT32_MAX) {
    return bad_argument("heads * size: expected 0 to 2^31 - 1");
  }
  return with_types(p.dtype, p.logits_dtype, [&](auto t, auto l) {
    using T = typename decltype(t)::type;
    using L = typename decltype(l)::type;
    constexpr int kV = kWide<T>;
    const bool wide =
        p.size % kV == 0 && aligned16(p.value) && aligned16(p.y) && aligned16(p.saved);
    return launch({"modality_gate_forward_kernel", dim3(row_blocks(p.tokens)), dim3(kRowThreads), 0,
                   p.stream},
                  wide ? forward_kernel<T, L, kV> : forward_kernel<T, L, 1>,
                  static_cast<const T *>(p.value), static_cast<const L *>(p.logits), p.mask,
                  static_cast<T *>(p.y), static_cast<T *>(p.saved), static_cast<int32_t>(p.tokens),
                  static_cast<int32_t>(p.heads), static_cast<int32_t>(wide ? p.size / kV : p.size),
                  p.per_token != 0);
  });
}

extern "C" mmadapt_cuda_status mmadapt_modality_gate_backward_cuda(
    const mmadapt_modality_gate_backward *problem) {
  using namespace mmadapt;
  const mmadapt_modality_gate_backward &p = *problem;
  if (p.tokens < 0 || p.tokens > INT32_MAX) return bad_argument("tokens: expected 0 to 2^31 - 1");
  if (p.heads < 0 || p.heads > kMostHeads) return bad_argument("heads: expected 0 to 1024");
  if (p.size < 0 || p.heads * p.size > INT32_MAX) {
    return bad_argument("heads * size: expected 0 to 2^31 - 1");
  }
  if (p.part_tokens < 1 || p.part_tokens > INT32_MAX) {
    return bad_argument("part_tokens: expected 1 to 2^31 - 1");
  }
  const bool sums = p.dlogits != nullptr && p.per_token == 0;
  if (sums && p.parts == nullptr) return bad_argument("parts: expected memory for dlogits [heads]");
  const int64_t blocks = (p.tokens + p.part_tokens - 1) / p.part_tokens;
  const auto status = with_types(p.dtype, p.logits_dtype, [&](auto t, auto l) {
    using T = typename decltype(t)::type;
    using L = typename decltype(l)::type;
    constexpr int kV = kWide<T>;
    const bool wide = p.size % kV == 0 && aligned16(p.dy) && aligned16(p.dvalue) &&
                      (p.dlogits == nullptr || aligned16(p.value));
    const size_t shared = (kRowWarps + (sums ? 1 : 0)) * p.heads * sizeof(float);
    return launch({"modality_gate_backward_kernel", dim3(blocks), dim3(kRowThreads), shared,
                   p.stream},
                  wide ? backward_kernel<T, L, kV> : backward_kernel<T, L, 1>,
                  static_cast<const T *>(p.dy), static_cast<const T *>(p.value),
                  static_cast<const L *>(p.logits), p.mask, static_cast<T *>(p.dvalue),
                  sums ? nullptr : static_cast<L *>(p.dlogits), sums ? p.parts : nullptr,
                  static_cast<int32_t>(p.tokens), static_cast<int32_t>(p.part_tokens),
                  static_cast<int32_t>(p.heads),
                  static_cast<int32_t>(wide ? p.size / kV : p.size), p.per_token != 0);
  });
  if (failed(status) || !sums) return status;
  return ordered_sum(p.parts, static_cast<int32_t>(blocks), p.heads, p.dlogits, p.logits_dtype,
                     p.stream);
}
