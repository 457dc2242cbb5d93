// The value gate with projected logits, backward, from g = tanh(logits) of the forward.
//
//     dvalue[t, h, :] = dy[t, h, :] * g[t, h]                        where mask[t], else dy
//     dlogits[t, h]   = (1 - g^2) sum_c dy[t, h, c] value[t, h, c]   for masked t
//     dhidden[t]      = dlogits[t] weight                            where mask[t], else 0
//     dweight         = sum over masked t of dlogits[t]^T hidden[t]
//
// Two kernels, each with the arithmetic of the masked rows in its busy blocks and a share of what
// full-sized outputs cost in the others: rows_kernel (dlogits, dhidden and dvalue of masked rows;
// copies of dy) and weight_kernel (dweight; zeros of dhidden). Products of 16-bit types run on tensor
// cores with dlogits rounded to that type, others in fp32.
//
//     dy, value, g --> dvalue, dlogits --> dhidden      rows_kernel, eight masked rows a block
//                              |
//                              +--> dlogits^T hidden --> dweight      weight_kernel, a tile a block

#include "gate_list.cuh"
#include "gate_mma.cuh"
#include "gate_outer.cuh"
#include "mmadapt/modality_gate.h"

namespace mmadapt {
namespace {

constexpr int kBusyBlocks = 256;  // of rows_kernel, about two for each SM of an H100

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

// `dlogits`: [heads, places], a group's eight rows side by side, zeros where it has fewer; null:
// dweight is not needed, and then the zeros of dhidden are written here. `dvalue` and `dhidden` may
// be null.
template <class T, class W, bool kVector>
__global__ void __launch_bounds__(kRowThreads, 2)
    rows_kernel(const T *__restrict__ dy, const T *__restrict__ value, const W *__restrict__ weight,
                const uint8_t *__restrict__ mask, const float *__restrict__ gate,
                T *__restrict__ dvalue, T *__restrict__ dhidden, T *__restrict__ dlogits,
                int32_t tokens, int64_t places, int32_t heads, int32_t per_head, int32_t width,
                int32_t busy) {
  constexpr int kV = kVector ? kWide<T> : 1;
  extern __shared__ float shared[];  // dlogits [heads, kRowWarps]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int vectors = heads * per_head;
  const int64_t role = block_role(blockIdx.x, busy, gridDim.x);
  if (role < 0) {
    each_other_row(mask, tokens, -1 - role, kCopyRows, [=](int64_t row) {
      const int64_t start = row * vectors * kV;
      if (dvalue != nullptr) copy_row<T, kV>(dy + start, dvalue + start, vectors, lane);
      if (dhidden != nullptr && dlogits == nullptr) {
        zero_row<T, kV>(dhidden + row * width, width / kV, lane);
      }
    });
    return;
  }
  const bool through = dhidden != nullptr || dlogits != nullptr;
  each_group(mask, tokens, static_cast<int>(role), busy, 1,
             [&](const int32_t *rows, int count, int, int64_t place) {
    if (warp < count) {
      const int64_t row = rows[warp], start = row * vectors * kV;
      const float *own = gate + row * heads;
      backward_row<T, kV>(dy + start, through ? value + start : nullptr,
                          dvalue == nullptr ? nullptr : dvalue + start, heads, per_head, lane,
                          [=](int head) { return own[head]; },
                          [=](int head, float sum) {
                            const float g = own[head];
                            shared[head * kRowWarps + warp] = sum * (1.f - g * g);
                          });
    } else {
      for (int h = lane; h < heads; h += 32) shared[h * kRowWarps + warp] = 0.f;
    }
    __syncthreads();
    for (int h = threadIdx.x; dlogits != nullptr && h < heads; h += kRowThreads) {
      Vec<T, kRowWarps> eight;
#pragma unroll
      for (int r = 0; r < kRowWarps; ++r) eight.at[r] = from_float<T>(shared[h * kRowWarps + r]);
      store<T, kRowWarps>(dlogits + h * places + place, eight);
    }
    if (dhidden == nullptr) return;
    if constexpr (kVector && sizeof(T) == 2) {
      expand_mma<T, W>(shared, weight, dhidden, rows, count, heads, width);
    } else {
      expand<T, W, kV>(shared, weight, dhidden, rows, count, heads, width);
    }
  });
}

// Busy blocks: a tile of dweight. The others: zeros in rows of dhidden outside the mask.
template <class T, class W, bool kVector>
__global__ void __launch_bounds__(kRowThreads, 2)
    weight_kernel(const T *__restrict__ hidden, const uint8_t *__restrict__ mask,
                  const T *__restrict__ dlogits, T *__restrict__ dhidden, W *__restrict__ dweight,
                  int32_t tokens, int64_t places, int32_t heads, int32_t width,
                  int32_t column_blocks, int32_t busy) {
  using Sums = OuterSums<T, kVector>;
  const int64_t role = block_role(blockIdx.x, busy, gridDim.x);
  if (role < 0) {
    constexpr int kV = kVector ? kWide<T> : 1;
    each_other_row(mask, tokens, -1 - role, kZeroRows, [=](int64_t row) {
      zero_row<T, kV>(dhidden + row * width, width / kV, threadIdx.x % 32);
    });
    return;
  }
  const int head = static_cast<int>(role) / column_blocks * Sums::kHeads;
  const int column = static_cast<int>(role) % column_blocks * Sums::kColumns;
  const OuterTile<T> tile = {hidden + column, dlogits + head * places, places,
                             heads - head,    width - column,          width};
  outer_product<Sums>(tile, mask, tokens, dweight + static_cast<int64_t>(head) * width + column);
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
  if (need_weight && (p.dlogits == nullptr || !aligned16(p.dlogits))) {
    return bad_argument("dlogits: expected memory for dweight, at a multiple of 16");
  }
  const int64_t groups = row_blocks(p.tokens), places = groups * kRowWarps;
  const auto tokens = static_cast<int32_t>(p.tokens), heads = static_cast<int32_t>(p.heads);
  const auto width = static_cast<int32_t>(p.width);
  const bool need_values = p.dhidden != nullptr || need_weight;

  const auto status = with_types(p.dtype, p.weight_dtype, [&](auto t, auto w) {
    using T = typename decltype(t)::type;
    using W = typename decltype(w)::type;
    constexpr int kV = kWide<T>;
    const bool wide = p.size % kV == 0 && aligned16(p.dy) && aligned16(p.dvalue) &&
                      (!need_values || aligned16(p.value)) &&
                      (p.dhidden == nullptr ||
                       (p.width % kV == 0 && aligned16(p.dhidden) && aligned16(p.weight)));
    const int64_t busy = groups < kBusyBlocks ? groups : kBusyBlocks;
    const bool others = p.dvalue != nullptr || (p.dhidden != nullptr && !need_weight);
    return launch({"projected_modality_gate_backward_rows_kernel",
                   dim3(busy + (others ? other_blocks(p.tokens, kCopyRows) : 0)),
                   dim3(kRowThreads), kRowWarps * p.heads * sizeof(float), p.stream},
                  wide ? rows_kernel<T, W, true> : rows_kernel<T, W, false>,
                  static_cast<const T *>(p.dy), static_cast<const T *>(p.value),
                  static_cast<const W *>(p.weight), p.mask, p.gate, static_cast<T *>(p.dvalue),
                  static_cast<T *>(p.dhidden), static_cast<T *>(need_weight ? p.dlogits : nullptr),
                  tokens, places, heads, static_cast<int32_t>(wide ? p.size / kV : p.size), width,
                  static_cast<int32_t>(busy));
  });
  if (failed(status) || !need_weight) return status;

  return with_types(p.dtype, p.weight_dtype, [&](auto t, auto w) {
    using T = typename decltype(t)::type;
    using W = typename decltype(w)::type;
    const bool wide = p.width % kWide<T> == 0 && aligned16(p.hidden) && aligned16(p.dhidden);
    const int64_t tile_heads = wide ? OuterSums<T, true>::kHeads : OuterSums<T, false>::kHeads;
    const int64_t tile_columns = wide ? OuterSums<T, true>::kColumns : OuterSums<T, false>::kColumns;
    const int64_t column_blocks = (p.width + tile_columns - 1) / tile_columns;
    const int64_t busy = (p.heads + tile_heads - 1) / tile_heads * column_blocks;
    const int64_t others = p.dhidden == nullptr ? 0 : other_blocks(p.tokens, kZeroRows);
    return launch({"projected_modality_gate_backward_weight_kernel", dim3(busy + others),
                   dim3(kRowThreads), 0, p.stream},
                  wide ? weight_kernel<T, W, true> : weight_kernel<T, W, false>,
                  static_cast<const T *>(p.hidden), p.mask, static_cast<const T *>(p.dlogits),
                  static_cast<T *>(p.dhidden), static_cast<W *>(p.dweight), tokens, places, heads,
                  width, static_cast<int32_t>(column_blocks), static_cast<int32_t>(busy));
  });
}
