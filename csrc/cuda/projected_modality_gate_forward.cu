// The value gate with projected logits, forward.
//
//     g[t]       = tanh(weight hidden[t])          where mask[t], else 0
//     y[t, h, :] = value[t, h, :] * g[t, h]        where mask[t], else value
//
// Busy blocks take the masked rows, eight rows and sixteen heads at a time: projection, then gating.
// The others do what is due for the rows outside the mask: zeros in g and, unless in place, copies.

#include "gate_list.cuh"
#include "gate_project.cuh"
#include "mmadapt/modality_gate.h"

namespace mmadapt {
namespace {

constexpr int kBusyBlocks = 256;  // about two for each SM of an H100

template <class T, class W, bool kVector>
__global__ void __launch_bounds__(kRowThreads, 2)
    forward_kernel(const T *value, const T *__restrict__ hidden, const W *__restrict__ weight,
                   const uint8_t *__restrict__ mask, T *y, float *__restrict__ gate, T *saved,
                   int32_t tokens, int32_t heads, int32_t per_head, int32_t width, int32_t busy,
                   int32_t other_rows) {
  constexpr int kV = kVector ? kWide<T> : 1;
  __shared__ Gates gates;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int vectors = heads * per_head;
  const int64_t role = block_role(blockIdx.x, busy, gridDim.x);
  if (role < 0) {
    each_other_row(mask, tokens, -1 - role, other_rows, [=](int64_t row) {
      const int64_t start = row * vectors * kV;
      for (int h = lane; h < heads; h += 32) gate[row * heads + h] = 0.f;
      if (y != value) copy_row<T, kV>(value + start, y + start, vectors, lane);
    });
    return;
  }
  const int head_blocks = (heads + kGateHeads - 1) / kGateHeads;
  each_group(mask, tokens, static_cast<int>(role), busy, head_blocks,
             [&](const int32_t *rows, int count, int head_block, int64_t) {
               const int first_head = head_block * kGateHeads;
               if constexpr (kVector && sizeof(T) == 2) {
                 project_mma(hidden, weight, rows, count, first_head, heads, width, gates, gate);
               } else {
                 project_exact<T, W, kV>(hidden, weight, rows, count, first_head, heads, width,
                                         gates, gate);
               }
               if (warp >= count) return;
               const int64_t start = (static_cast<int64_t>(rows[warp]) * vectors +
                                      static_cast<int64_t>(first_head) * per_head) * kV;
               const float *own = gates[warp];
               gate_row<T, kV>(value + start, y + start,
                               saved == nullptr ? nullptr : saved + start,
                               min(kGateHeads, heads - first_head) * per_head, per_head, lane,
                               [=](int head) { return own[head]; });
             });
}

}  // namespace
}  // namespace mmadapt

extern "C" mmadapt_cuda_status mmadapt_projected_modality_gate_forward_cuda(
    const mmadapt_projected_modality_gate_forward *problem) {
  using namespace mmadapt;
  const mmadapt_projected_modality_gate_forward &p = *problem;
  if (p.tokens < 0 || p.tokens > INT32_MAX) return bad_argument("tokens: expected 0 to 2^31 - 1");
  if (p.heads < 0 || p.size < 0 || p.heads * p.size > INT32_MAX) {
    return bad_argument("heads * size: expected 0 to 2^31 - 1");
  }
  if (p.width < 0 || p.width > INT32_MAX / 2) return bad_argument("width: expected 0 to 2^30 - 1");
  return with_types(p.dtype, p.weight_dtype, [&](auto t, auto w) {
    using T = typename decltype(t)::type;
    using W = typename decltype(w)::type;
    constexpr int kV = kWide<T>;
    const bool wide = p.size % kV == 0 && p.width % kV == 0 && aligned16(p.value) &&
                      aligned16(p.y) && aligned16(p.saved) && aligned16(p.hidden) &&
                      aligned16(p.weight);
    const int32_t other_rows = p.y == p.value ? kIdleRows : kCopyRows;
    const int64_t others = other_blocks(p.tokens, other_rows);
    const int64_t items = row_blocks(p.tokens) * ((p.heads + kGateHeads - 1) / kGateHeads);
    const int64_t busy = items < kBusyBlocks ? items : kBusyBlocks;
    return launch({"projected_modality_gate_forward_kernel", dim3(busy + others), dim3(kRowThreads),
                   0, p.stream},
                  wide ? forward_kernel<T, W, true> : forward_kernel<T, W, false>,
                  static_cast<const T *>(p.value), static_cast<const T *>(p.hidden),
                  static_cast<const W *>(p.weight), p.mask, static_cast<T *>(p.y), p.gate,
                  static_cast<T *>(p.saved), static_cast<int32_t>(p.tokens),
                  static_cast<int32_t>(p.heads),
                  static_cast<int32_t>(wide ? p.size / kV : p.size), static_cast<int32_t>(p.width),
                  static_cast<int32_t>(busy), other_rows);
  });
}
