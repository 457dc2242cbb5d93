// The value gate with projected logits, backward, from g = tanh(logits) of the forward.
//
//     dvalue[t, h, :] = dy[t, h, :] * g[t, h]                        where mask[t], else dy
//     dlogits[t, h]   = (1 - g^2) sum_c dy[t, h, c] value[t, h, c]   for masked t
//     dhidden[t]      = dlogits[t] weight                            where mask[t], else 0
//     dweight         = sum over masked t of dlogits[t]^T hidden[t]
//
// Two kernels, each with the arithmetic of the masked rows in its first blocks and half of what
// full-sized outputs cost in the others: rows_kernel (dlogits, dhidden and dvalue of masked rows;
// copies of dy) and weight_kernel (parts of dweight; zeros of dhidden). Products are fp32: at 1/16
// masked rows they hide behind the copies.

#include "gate_rows.cuh"
#include "mmadapt/masked_rows.h"
#include "mmadapt/modality_gate.h"
#include "ordered_sum.cuh"

namespace mmadapt {
namespace {

constexpr int kListBlocks = 256;
constexpr int kCopyPasses = 4;

// dhidden of up to eight listed rows: a thread owns V columns of all of them. V is at most 4: more
// registers would halve the warps that copy in the meantime.
template <class T, class W, int V>
__device__ __forceinline__ void expand(const float *dlogits, const W *__restrict__ weight,
                                       T *__restrict__ dhidden, const int32_t *rows, int count,
                                       int heads, int width) {
  for (int k = threadIdx.x * V; k < width; k += kRowThreads * V) {
    float sum[kRowWarps][V] = {};
#pragma unroll 8
    for (int head = 0; head < heads; ++head) {
      const Vec<W, V> w = load<W, V>(weight + static_cast<int64_t>(head) * width + k);
#pragma unroll
      for (int r = 0; r < kRowWarps; ++r) {
        const float d = dlogits[head * kRowWarps + r];
#pragma unroll
        for (int e = 0; e < V; ++e) sum[r][e] += d * to_float(w.at[e]);
      }
    }
#pragma unroll
    for (int r = 0; r < kRowWarps; ++r) {
      if (r < count) {
        Vec<T, V> out;
#pragma unroll
        for (int e = 0; e < V; ++e) out.at[e] = from_float<T>(sum[r][e]);
        store<T, V>(dhidden + static_cast<int64_t>(rows[r]) * width + k, out);
      }
    }
  }
}

// `dlogits`: by place in the list, [count, heads]; null: dweight is not needed, and then the zeros
// of dhidden are written here. `dvalue` and `dhidden` may be null.
template <class T, class W, bool kVector>
__global__ void __launch_bounds__(kRowThreads, 2)
    rows_kernel(const T *__restrict__ dy, const T *__restrict__ value, const W *__restrict__ weight,
                const uint8_t *__restrict__ mask, const float *__restrict__ gate,
                const int32_t *__restrict__ rows, const int32_t *__restrict__ count,
                T *__restrict__ dvalue, T *__restrict__ dhidden, float *__restrict__ dlogits,
                int32_t tokens, int32_t heads, int32_t per_head, int32_t width,
                int32_t list_blocks) {
  constexpr int kV = kVector ? kWide<T> : 1;
  extern __shared__ float shared[];  // dlogits [heads, kRowWarps]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int vectors = heads * per_head;
  if (blockIdx.x < list_blocks) {
    const bool through = dhidden != nullptr || dlogits != nullptr;
    const int32_t listed = *count;
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * kRowWarps; first < listed;
         first += static_cast<int64_t>(list_blocks) * kRowWarps) {
      const int here = static_cast<int>(min(listed - first, static_cast<int64_t>(kRowWarps)));
      if (warp < here) {
        const int64_t row = rows[first + warp], start = row * vectors * kV;
        const float *own = gate + row * heads;
        float *listed_dlogits = dlogits == nullptr ? nullptr : dlogits + (first + warp) * heads;
        backward_row<T, kV>(dy + start, through ? value + start : nullptr,
                            dvalue == nullptr ? nullptr : dvalue + start, heads, per_head, lane,
                            [=](int head) { return own[head]; },
                            [=](int head, float sum) {
                              const float g = own[head], d = sum * (1.f - g * g);
                              shared[head * kRowWarps + warp] = d;
                              if (listed_dlogits != nullptr) listed_dlogits[head] = d;
                            });
      } else {
        for (int h = lane; h < heads; h += 32) shared[h * kRowWarps + warp] = 0.f;
      }
      __syncthreads();
      if (dhidden != nullptr) {
        expand<T, W, (kV < 4 ? kV : 4)>(shared, weight, dhidden, rows + first, here, heads, width);
      }
      __syncthreads();  // shared is written again
    }
    return;
  }
  const int64_t base =
      static_cast<int64_t>(blockIdx.x - list_blocks) * (kRowWarps * kCopyPasses) + warp;
  for (int pass = 0; pass < kCopyPasses; ++pass) {
    const int64_t row = base + pass * kRowWarps;
    if (row >= tokens || mask[row] != 0) continue;
    const int64_t start = row * vectors * kV;
    if (dvalue != nullptr) copy_row<T, kV>(dy + start, dvalue + start, vectors, lane);
    if (dhidden != nullptr && dlogits == nullptr) {
      zero_row<T, kV>(dhidden + row * width, width / kV, lane);
    }
  }
}

constexpr int kPartHeads = 32, kHeadsPerWarp = kPartHeads / kRowWarps;
constexpr int kBatchRows = 32;

// The first `runs * head_blocks * column_blocks` blocks: dweight of 32 heads by 32 V columns,
// summed over one part of the list. The others: zeros in rows of dhidden outside the mask.
template <class T, bool kVector>
__global__ void __launch_bounds__(kRowThreads, 2)
    weight_kernel(const T *__restrict__ hidden, const uint8_t *__restrict__ mask,
                  const float *__restrict__ dlogits, const int32_t *__restrict__ rows,
                  const int32_t *__restrict__ count, T *__restrict__ dhidden,
                  float *__restrict__ parts, int32_t tokens, int32_t heads, int32_t width,
                  int32_t runs, int32_t head_blocks, int32_t column_blocks) {
  constexpr int kV = kVector ? kWide<T> : 1;
  __shared__ int32_t batch_rows[kBatchRows];
  __shared__ float batch[kBatchRows][kPartHeads];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t part_blocks = static_cast<int64_t>(runs) * head_blocks * column_blocks;
  if (blockIdx.x >= part_blocks) {
    const int64_t base = (blockIdx.x - part_blocks) * (kRowWarps * kCopyPasses) + warp;
    for (int pass = 0; pass < kCopyPasses; ++pass) {
      const int64_t row = base + pass * kRowWarps;
      if (row < tokens && mask[row] == 0) {
        zero_row<T, kV>(dhidden + row * width, width / kV, lane);
      }
    }
    return;
  }
  const int32_t column_block = blockIdx.x % column_blocks;
  const int32_t head_block = blockIdx.x / column_blocks % head_blocks;
  const int32_t run = blockIdx.x / column_blocks / head_blocks;
  const int32_t listed = *count;
  const int32_t first = part_start(listed, run, runs), last = part_start(listed, run + 1, runs);
  const int64_t column = (static_cast<int64_t>(column_block) * 32 + lane) * kV;
  const int head = head_block * kPartHeads + warp * kHeadsPerWarp;  // this warp's first
  float sum[kHeadsPerWarp][kV] = {};
  for (int32_t start = first; start < last; start += kBatchRows) {
    const int here = min(last - start, kBatchRows);
    __syncthreads();  // the batch before has been read
    if (threadIdx.x < here) batch_rows[threadIdx.x] = rows[start + threadIdx.x];
    for (int i = threadIdx.x; i < here * kPartHeads; i += kRowThreads) {
      const int r = i / kPartHeads, h = head_block * kPartHeads + i % kPartHeads;
      batch[r][i % kPartHeads] =
          h < heads ? dlogits[static_cast<int64_t>(start + r) * heads + h] : 0.f;
    }
    __syncthreads();
    if (column < width) {
#pragma unroll 8
      for (int r = 0; r < here; ++r) {
        const int64_t at = static_cast<int64_t>(batch_rows[r]) * width + column;
        const Vec<T, kV> x = load<T, kV>(hidden + at);
#pragma unroll
        for (int j = 0; j < kHeadsPerWarp; ++j) {
          const float d = batch[r][warp * kHeadsPerWarp + j];
#pragma unroll
          for (int e = 0; e < kV; ++e) sum[j][e] += d * to_float(x.at[e]);
        }
      }
    }
  }
  if (first == last || column >= width) return;  // a part without rows is not read either
#pragma unroll
  for (int j = 0; j < kHeadsPerWarp; ++j) {
    if (head + j < heads) {
      float *to = parts + (static_cast<int64_t>(run) * heads + head + j) * width + column;
#pragma unroll
      for (int e = 0; e < kV; ++e) to[e] = sum[j][e];
    }
  }
}

}  // namespace
}  // namespace mmadapt

extern "C" mmadapt_cuda_status mmadapt_projected_modality_gate_backward_cuda(
    const mmadapt_projected_modality_gate_backward *problem) {
  using namespace mmadapt;
  const mmadapt_projected_modality_gate_backward &p = *problem;
  if (p.tokens < 0 || p.tokens > INT32_MAX) return bad_argument("tokens: expected 0 to 2^31 - 1");
  if (p.heads < 0 || p.heads > kMostHeads) return bad_argument("heads: expected 0 to 1024");
  if (p.size < 0 || p.heads * p.size > INT32_MAX) {
    return bad_argument("heads * size: expected 0 to 2^31 - 1");
  }
  if (p.width < 0 || p.width > INT32_MAX / 2) return bad_argument("width: expected 0 to 2^30 - 1");
  const bool need_weight = p.dweight != nullptr;
  if (need_weight && (p.runs < 1 || p.runs > 1024)) return bad_argument("runs: expected 1 to 1024");
  if (need_weight && (p.dlogits == nullptr || p.parts == nullptr)) {
    return bad_argument("dlogits, parts: expected memory for dweight");
  }
  const mmadapt_masked_rows list = {p.tokens, p.mask, p.rows, p.rows + p.tokens, p.stream};
  auto status = mmadapt_masked_rows_cuda(&list);
  if (failed(status)) return status;
  const int64_t tiles = row_blocks(p.tokens);
  const int64_t copy_blocks = (tiles + kCopyPasses - 1) / kCopyPasses;
  const auto tokens = static_cast<int32_t>(p.tokens), heads = static_cast<int32_t>(p.heads);
  const auto width = static_cast<int32_t>(p.width);
  const bool need_values = p.dhidden != nullptr || need_weight;

  status = with_types(p.dtype, p.weight_dtype, [&](auto t, auto w) {
    using T = typename decltype(t)::type;
    using W = typename decltype(w)::type;
    constexpr int kV = kWide<T>;
    const bool wide = p.size % kV == 0 && aligned16(p.dy) && aligned16(p.dvalue) &&
                      (!need_values || aligned16(p.value)) &&
                      (p.dhidden == nullptr ||
                       (p.width % kV == 0 && aligned16(p.dhidden) && aligned16(p.weight)));
    const int64_t list_blocks = tiles < kListBlocks ? tiles : kListBlocks;
    const bool others = p.dvalue != nullptr || (p.dhidden != nullptr && !need_weight);
    return launch({"projected_modality_gate_backward_rows_kernel",
                   dim3(list_blocks + (others ? copy_blocks : 0)), dim3(kRowThreads),
                   kRowWarps * p.heads * sizeof(float), p.stream},
                  wide ? rows_kernel<T, W, true> : rows_kernel<T, W, false>,
                  static_cast<const T *>(p.dy), static_cast<const T *>(p.value),
                  static_cast<const W *>(p.weight), p.mask, p.gate, list.rows, list.count,
                  static_cast<T *>(p.dvalue), static_cast<T *>(p.dhidden),
                  need_weight ? p.dlogits : nullptr, tokens, heads,
                  static_cast<int32_t>(wide ? p.size / kV : p.size), width,
                  static_cast<int32_t>(list_blocks));
  });
  if (failed(status) || !need_weight) return status;

  const auto runs = static_cast<int32_t>(p.runs);
  status = with_type(p.dtype, "dtype: expected F32, BF16 or F16", [&](auto t) {
    using T = typename decltype(t)::type;
    constexpr int kV = kWide<T>;
    const bool wide = p.width % kV == 0 && aligned16(p.hidden) && aligned16(p.dhidden);
    const int64_t columns = 32 * (wide ? kV : 1);
    const int64_t column_blocks = (p.width + columns - 1) / columns;
    const int64_t head_blocks = (p.heads + kPartHeads - 1) / kPartHeads;
    const int64_t zero_blocks = p.dhidden == nullptr ? 0 : copy_blocks;
    const int64_t blocks = runs * head_blocks * column_blocks + zero_blocks;
    return launch({"projected_modality_gate_backward_weight_kernel", dim3(blocks),
                   dim3(kRowThreads), 0, p.stream},
                  wide ? weight_kernel<T, true> : weight_kernel<T, false>,
                  static_cast<const T *>(p.hidden), p.mask, p.dlogits, list.rows, list.count,
                  static_cast<T *>(p.dhidden), p.parts, tokens, heads, width, runs,
                  static_cast<int32_t>(head_blocks), static_cast<int32_t>(column_blocks));
  });
  if (failed(status)) return status;
  return ordered_sum(p.parts, runs, list.count, p.heads * p.width, p.dweight, p.weight_dtype,
                     p.stream);
}
