// The value gate with projected logits, backward, from g = tanh(logits) of the forward.
//
//     dvalue[t, h, :] = dy[t, h, :] * g[t, h]                        where mask[t], else dy
//     dlogits[t, h]   = (1 - g^2) sum_c dy[t, h, c] value[t, h, c]   for masked t
//     dhidden[t]      = dlogits[t] weight                            where mask[t], else 0
//     dweight         = sum over masked t of dlogits[t]^T hidden[t]
//
// Two kernels, each with the arithmetic of the masked rows in its first blocks and half of what
// full-sized outputs cost in the others: rows_kernel (dlogits, dhidden and dvalue of masked rows;
// copies of dy) and weight_kernel (parts of dweight; zeros of dhidden). Products of 16-bit types
// run on tensor cores with dlogits rounded to that type, others in fp32.

#include "gate_mma.cuh"
#include "gate_rows.cuh"
#include "mmadapt/masked_rows.h"
#include "mmadapt/modality_gate.h"
#include "ordered_sum.cuh"

namespace mmadapt {
namespace {

constexpr int kListBlocks = 256;
constexpr int kCopyPasses = 4;

// dhidden of up to eight listed rows: a thread owns V columns of all of them.
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

// The same on tensor cores, 64 columns a warp and step: A is weight transposed (eight columns of
// four heads a lane), B dlogits, so that a lane ends up with eight adjacent columns of two rows.
template <class T, class W>
__device__ __forceinline__ void expand_mma(const float *dlogits, const W *__restrict__ weight,
                                           T *__restrict__ dhidden, const int32_t *rows, int count,
                                           int heads, int width) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group = lane / 4, quad = lane % 4;
  for (int base = warp * 64; base < width; base += kRowWarps * 64) {
    const int column = base + group * 8;
    const bool inside = column < width;
    float c[4][4] = {};
#pragma unroll 2
    for (int first = 0; first < heads; first += 16) {
      uint32_t k[4][4];
      float d[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int head = first + lane_k(quad, i);
        const bool there = head < heads;
        load_eight<T>(k[i], weight + static_cast<int64_t>(there ? head : 0) * width + column,
                      there && inside);
        d[i] = there ? dlogits[head * kRowWarps + group] : 0.f;
      }
      const uint32_t b0 = pack<T>(d[0], d[1]), b1 = pack<T>(d[2], d[3]);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        uint32_t a[4];
        transposed(a, k, j);
        mma(c[j], a, b0, b1, T{});
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = 2 * quad + half;
      if (r < count && inside) {
        Vec<T, 8> out;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          out.at[2 * j] = from_float<T>(c[j][half]);
          out.at[2 * j + 1] = from_float<T>(c[j][2 + half]);
        }
        store<T, 8>(dhidden + static_cast<int64_t>(rows[r]) * width + column, out);
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
        if constexpr (kVector && sizeof(T) == 2) {
          expand_mma<T, W>(shared, weight, dhidden, rows + first, here, heads, width);
        } else {
          expand<T, W, kV>(shared, weight, dhidden, rows + first, here, heads, width);
        }
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

constexpr int kPartHeads = 16, kHeadsPerWarp = kPartHeads / kRowWarps;
constexpr int kBatchRows = 32;
constexpr int kBatchStride = kPartHeads + 4;  // a quad's rows lie in different banks

// Rows of the list and their dlogits, in shared memory; zeros past the end.
struct Batch {
  int32_t rows[kBatchRows];
  float dlogits[kBatchRows][kBatchStride];
};

__device__ __forceinline__ void fill(Batch &batch, const int32_t *rows, const float *dlogits,
                                     int32_t start, int here, int first_head, int heads) {
  __syncthreads();  // the batch before has been read
  if (threadIdx.x < here) batch.rows[threadIdx.x] = rows[start + threadIdx.x];
  for (int i = threadIdx.x; i < kBatchRows * kPartHeads; i += kRowThreads) {
    const int r = i / kPartHeads, h = i % kPartHeads;
    const bool there = r < here && first_head + h < heads;
    batch.dlogits[r][h] =
        there ? dlogits[static_cast<int64_t>(start + r) * heads + first_head + h] : 0.f;
  }
  __syncthreads();
}

// Columns of a block: 32 V, every warp the same ones for heads of its own; on tensor cores 64 a
// warp, for all of the heads.
template <class T, bool kVector>
constexpr bool kTensorCores = kVector && sizeof(T) == 2;
template <class T, bool kVector>
constexpr int kPartColumns = kTensorCores<T, kVector> ? 64 * kRowWarps
                                                      : 32 * (kVector ? kWide<T> : 1);

template <class T, int V>
__device__ __forceinline__ void sum_rows(Batch &batch, const T *__restrict__ hidden,
                                         const float *__restrict__ dlogits,
                                         const int32_t *__restrict__ rows, float *__restrict__ part,
                                         int32_t first, int32_t last, int64_t first_column,
                                         int first_head, int heads, int width) {
  const int lane = threadIdx.x % 32, own = threadIdx.x / 32 * kHeadsPerWarp;
  const int64_t column = first_column + lane * V;
  float sum[kHeadsPerWarp][V] = {};
  for (int32_t start = first; start < last; start += kBatchRows) {
    const int here = min(last - start, kBatchRows);
    fill(batch, rows, dlogits, start, here, first_head, heads);
    if (column < width) {
#pragma unroll 8
      for (int r = 0; r < here; ++r) {
        const int64_t at = static_cast<int64_t>(batch.rows[r]) * width + column;
        const Vec<T, V> x = load<T, V>(hidden + at);
#pragma unroll
        for (int j = 0; j < kHeadsPerWarp; ++j) {
          const float d = batch.dlogits[r][own + j];
#pragma unroll
          for (int e = 0; e < V; ++e) sum[j][e] += d * to_float(x.at[e]);
        }
      }
    }
  }
  if (column >= width) return;
#pragma unroll
  for (int j = 0; j < kHeadsPerWarp; ++j) {
    const int head = first_head + own + j;
    if (head < heads) {
#pragma unroll
      for (int e = 0; e < V; ++e) part[static_cast<int64_t>(head) * width + column + e] = sum[j][e];
    }
  }
}

// A is hidden transposed (eight columns of four rows a lane), B dlogits.
template <class T>
__device__ __forceinline__ void sum_rows_mma(Batch &batch, const T *__restrict__ hidden,
                                             const float *__restrict__ dlogits,
                                             const int32_t *__restrict__ rows,
                                             float *__restrict__ part, int32_t first, int32_t last,
                                             int64_t first_column, int first_head, int heads,
                                             int width) {
  constexpr int kTiles = kPartHeads / 8;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group = lane / 4, quad = lane % 4;
  const int64_t column = first_column + warp * 64 + group * 8;
  const bool inside = column < width;
  float c[kTiles][4][4] = {};
  for (int32_t start = first; start < last; start += kBatchRows) {
    const int here = min(last - start, kBatchRows);
    fill(batch, rows, dlogits, start, here, first_head, heads);
#pragma unroll 1  // more would spill
    for (int base = 0; base < kBatchRows; base += 16) {
      uint32_t k[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = base + lane_k(quad, i);
        const bool there = r < here && inside;
        load_eight<T>(k[i], hidden + (there ? static_cast<int64_t>(batch.rows[r]) * width : 0) +
                                (there ? column : 0),
                      there);
      }
      uint32_t a[4][4];
#pragma unroll
      for (int j = 0; j < 4; ++j) transposed(a[j], k, j);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        float d[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) d[i] = batch.dlogits[base + lane_k(quad, i)][8 * n + group];
        const uint32_t b0 = pack<T>(d[0], d[1]), b1 = pack<T>(d[2], d[3]);
#pragma unroll
        for (int j = 0; j < 4; ++j) mma(c[n][j], a[j], b0, b1, T{});
      }
    }
  }
  if (!inside) return;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int head = first_head + 8 * n + 2 * quad + half;
      if (head < heads) {
        Vec<float, 8> out;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          out.at[2 * j] = c[n][j][half];
          out.at[2 * j + 1] = c[n][j][2 + half];
        }
        store<float, 8>(part + static_cast<int64_t>(head) * width + column, out);
      }
    }
  }
}

// The first `runs * head_blocks * column_blocks` blocks: dweight of 16 heads by kPartColumns,
// summed over one part of the list. The others: zeros in rows of dhidden outside the mask.
template <class T, bool kVector>
__global__ void __launch_bounds__(kRowThreads, 2)
    weight_kernel(const T *__restrict__ hidden, const uint8_t *__restrict__ mask,
                  const float *__restrict__ dlogits, const int32_t *__restrict__ rows,
                  const int32_t *__restrict__ count, T *__restrict__ dhidden,
                  float *__restrict__ parts, int32_t tokens, int32_t heads, int32_t width,
                  int32_t runs, int32_t head_blocks, int32_t column_blocks) {
  constexpr int kV = kVector ? kWide<T> : 1;
  __shared__ Batch batch;
  const int64_t part_blocks = static_cast<int64_t>(runs) * head_blocks * column_blocks;
  if (blockIdx.x >= part_blocks) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
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
  if (first == last) return;  // a part without rows is not read either
  const int64_t column = static_cast<int64_t>(column_block) * kPartColumns<T, kVector>;
  float *part = parts + static_cast<int64_t>(run) * heads * width;
  if constexpr (kTensorCores<T, kVector>) {
    sum_rows_mma<T>(batch, hidden, dlogits, rows, part, first, last, column,
                    head_block * kPartHeads, heads, width);
  } else {
    sum_rows<T, kV>(batch, hidden, dlogits, rows, part, first, last, column,
                    head_block * kPartHeads, heads, width);
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
    const bool wide = p.width % kWide<T> == 0 && aligned16(p.hidden) && aligned16(p.dhidden) &&
                      aligned16(p.parts);
    const int64_t columns = wide ? kPartColumns<T, true> : kPartColumns<T, false>;
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
