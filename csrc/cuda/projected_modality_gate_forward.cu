// The value gate with projected logits, forward.
//
//     g[t]       = tanh(weight hidden[t])          where mask[t], else 0
//     y[t, h, :] = value[t, h, :] * g[t, h]        where mask[t], else value
//
// The first blocks take the masked rows off a list, eight rows and sixteen heads at a time:
// projection, then gating. The others do what is due for the rows outside the mask: zeros in g and,
// unless in place, copies. The busy blocks start first, and no block waits for memory that it does
// not use.

#include "gate_project.cuh"
#include "gate_rows.cuh"
#include "mmadapt/masked_rows.h"
#include "mmadapt/modality_gate.h"

namespace mmadapt {
namespace {

constexpr int kListBlocks = 256;  // about two for each SM of an H100
constexpr int kCopyPasses = 4;    // rows of a copying block: 8 times this

template <class T, class W, bool kVector>
__global__ void __launch_bounds__(kRowThreads, 2)
    forward_kernel(const T *value, const T *__restrict__ hidden, const W *__restrict__ weight,
                   const uint8_t *__restrict__ mask, const int32_t *__restrict__ rows,
                   const int32_t *__restrict__ count, T *y, float *__restrict__ gate, T *saved,
                   int32_t tokens, int32_t heads, int32_t per_head, int32_t width,
                   int32_t list_blocks) {
  constexpr int kV = kVector ? kWide<T> : 1;
  __shared__ Gates gates;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int vectors = heads * per_head;
  if (blockIdx.x < list_blocks) {
    const int32_t listed = *count, head_blocks = (heads + kGateHeads - 1) / kGateHeads;
    const int64_t items = (static_cast<int64_t>(listed) + kRowWarps - 1) / kRowWarps * head_blocks;
    for (int64_t item = blockIdx.x; item < items; item += list_blocks) {
      const int64_t first = item / head_blocks * kRowWarps;
      const int first_head = static_cast<int>(item % head_blocks) * kGateHeads;
      const int here = static_cast<int>(min(listed - first, static_cast<int64_t>(kRowWarps)));
      if constexpr (kVector && sizeof(T) == 2) {
        project_mma(hidden, weight, rows + first, here, first_head, heads, width, gates, gate);
      } else {
        project_exact<T, W, kV>(hidden, weight, rows + first, here, first_head, heads, width,
                                gates, gate);
      }
      if (warp < here) {
        const int64_t row = rows[first + warp];
        const int64_t start = (row * vectors + static_cast<int64_t>(first_head) * per_head) * kV;
        const int own_vectors = min(kGateHeads, heads - first_head) * per_head;
        const float *own = gates[warp];
        gate_row<T, kV>(value + start, y + start, saved == nullptr ? nullptr : saved + start,
                        own_vectors, per_head, lane, [=](int head) { return own[head]; });
      }
      __syncthreads();  // gates are written again
    }
    return;
  }
  const int64_t base =
      static_cast<int64_t>(blockIdx.x - list_blocks) * (kRowWarps * kCopyPasses) + warp;
  for (int pass = 0; pass < kCopyPasses; ++pass) {
    const int64_t row = base + pass * kRowWarps;
    if (row >= tokens || mask[row] != 0) continue;
    for (int h = lane; h < heads; h += 32) gate[row * heads + h] = 0.f;
    const int64_t start = row * vectors * kV;
    if (y != value) copy_row<T, kV>(value + start, y + start, vectors, lane);
  }
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
  const mmadapt_masked_rows list = {p.tokens, p.mask, p.rows, p.rows + p.tokens, p.stream};
  const auto status = mmadapt_masked_rows_cuda(&list);
  if (failed(status)) return status;
  return with_types(p.dtype, p.weight_dtype, [&](auto t, auto w) {
    using T = typename decltype(t)::type;
    using W = typename decltype(w)::type;
    constexpr int kV = kWide<T>;
    const bool wide = p.size % kV == 0 && p.width % kV == 0 && aligned16(p.value) &&
                      aligned16(p.y) && aligned16(p.saved) && aligned16(p.hidden) &&
                      aligned16(p.weight);
    const int64_t tiles = row_blocks(p.tokens);
    const int64_t items = tiles * ((p.heads + kGateHeads - 1) / kGateHeads);
    const int64_t list_blocks = items < kListBlocks ? items : kListBlocks;
    const int64_t copy_blocks = (tiles + kCopyPasses - 1) / kCopyPasses;
    return launch({"projected_modality_gate_forward_kernel", dim3(list_blocks + copy_blocks),
                   dim3(kRowThreads), 0, p.stream},
                  wide ? forward_kernel<T, W, true> : forward_kernel<T, W, false>,
                  static_cast<const T *>(p.value), static_cast<const T *>(p.hidden),
                  static_cast<const W *>(p.weight), p.mask, list.rows, list.count,
                  static_cast<T *>(p.y), p.gate, static_cast<T *>(p.saved),
                  static_cast<int32_t>(p.tokens), static_cast<int32_t>(p.heads),
                  static_cast<int32_t>(wide ? p.size / kV : p.size), static_cast<int32_t>(p.width),
                  static_cast<int32_t>(list_blocks));
  });
}
