// Stages 1 and 2 of one warpgroup. The data flow is drawn in kernel.cuh.
#pragma once

#include "../hopper/fragment.cuh"
#include "../hopper/tma.cuh"
#include "../hopper/wgmma.cuh"
#include "ring.cuh"

namespace mmadapt::swiglu {

// What a warpgroup is and where its parts of shared memory lie.
template <class S>
struct Warpgroup {
  uint32_t shared;
  int index, thread, warp, lane;  // thread 0..127
  int group, split;               // row group of the tile; which of its SPLIT warpgroups
  int half, depth;                // half of the ranks, whose chunks
  int block;                      // rank in the cluster
  uint32_t sums_parity, hidden_parity;

  __device__ __forceinline__ uint32_t hidden(const Plan &p) const {
    return shared + p.hidden + group * (S::kOperands * S::kAllGroups * 2 * kFragment);
  }
  __device__ __forceinline__ uint32_t scalars(const Plan &p) const {
    return shared + p.scalars + group * (S::kScalars * 256);
  }
  // Of the warpgroup that owns sums of this row group and half of the ranks.
  __device__ __forceinline__ int owner() const { return group * S::kHalves + half; }
  __device__ __forceinline__ uint32_t sums_barrier(const Plan &p) const {
    return shared + p.barriers + 32 * kMaxStages + 8 * owner();
  }
  __device__ __forceinline__ uint32_t hidden_barrier(const Plan &p) const {
    return shared + p.barriers + 32 * kMaxStages + 8 * (kWarpgroups + group);
  }
  __device__ __forceinline__ bool leads() const { return warp == 0 && lane == 0; }
  // Of this thread's rows among those of the group: its pair, counted. The lane is read anew each time: kept in a
  // register from stage to stage, it would push out another.
  __device__ __forceinline__ int pair() const { return warp * 8 + lane_id() / 4; }
  // This thread's two rows of the tile, 8 apart; and its lane's row for load_blocks and store_blocks.
  __device__ __forceinline__ int row() const { return group * kGroupRows + warp * 16 + lane / 4; }
  __device__ __forceinline__ uint32_t block_at(uint32_t tile, int unit) const {
    return tile + group * (kGroupRows * 128) +
           swizzled(warp * 16 + lane % 8 + lane / 8 % 2 * 8, unit + lane / 16, 128);
  }
};

template <class S>
__device__ __forceinline__ Warpgroup<S> make_warpgroup(uint32_t shared) {
  Warpgroup<S> w;
  w.shared = shared;
  w.thread = threadIdx.x % 128;
  w.lane = w.thread % 32;
  w.warp = uniform(w.thread / 32);
  w.index = uniform(threadIdx.x / 128);
  w.group = w.index / S::SPLIT;
  w.split = w.index % S::SPLIT;
  w.half = w.split % S::kHalves;
  w.depth = w.split / S::kHalves;
  w.block = static_cast<int>(cluster_block());
  w.sums_parity = w.hidden_parity = 0;
  return w;
}

// The experts of a tile, of this row group, and of this thread's two rows.
struct Routing {
  Range tile, own;
  int id[2];
  bool all;  // every row of the group has an expert
  __device__ __forceinline__ bool wants(int e) const { return own.low() <= e && e <= own.high(); }
  __device__ __forceinline__ bool pure() const { return own.low() == own.high(); }
};

template <class S>
__device__ __forceinline__ Routing route(const Arguments &a, const Warpgroup<S> &w, int tile) {
  Routing r = {{0}, {0}, {0, 0}, true};
  if constexpr (!S::ROUTED) return r;
  const int64_t first = int64_t(tile) * S::kRows;
  r.tile = tile_experts(a, tile);
  r.own = experts_of(a, first + w.group * kGroupRows, 2);
  bool mine = true;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t row = first + w.row() + 8 * i;
    const int id = row < a.tokens ? __ldg(a.expert + row) : -1;
    r.id[i] = id < a.experts ? id : -1;  // more is against the contract; there is no such expert
    mine &= r.id[i] >= 0;
  }
  // Per warp; a warp's rows are its own.
  r.all = uniform(__all_sync(0xFFFFFFFFu, mine));
  return r;
}

// A stage is freed while the next is worked on, unless the ring has no next.
__device__ __forceinline__ bool frees_at_once(const Plan &p) {
  return p.stages == 1 || p.weight_stages == 1;
}

// Every warp says that it is done with a stage; 0: none.
__device__ __forceinline__ void release(uint32_t empty_barrier, int lane) {
  if (empty_barrier != 0 && lane == 0) barrier_arrive(empty_barrier);
}

// Sums over the columns of a chunk: squares of x, or dy x weight x x. A lane reads whole 16-byte units of one row of
// its warp, every second unit, which no other lane's bank holds; to_own_rows brings the sums to who needs them.
template <class T, class S>
__device__ __forceinline__ void add_row_sums(float &row_sum, const Arguments &a, const Warpgroup<S> &w,
                                             uint32_t tile, int c) {
  const Plan &p = a.plan;
  const int row = w.warp * 16 + w.lane % 16;
  float sums[2] = {0.0f, 0.0f};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int unit = 2 * k + w.lane / 16;
    const uint32_t at = tile + w.group * (kGroupRows * 128) + swizzled(row, unit, 128);
    const uint4 words = load_shared_words4(at);
    const uint32_t first[4] = {words.x, words.y, words.z, words.w};
    if constexpr (S::BACKWARD) {
      const uint4 others = load_shared_words4(at + p.input_bytes);
      const uint32_t second[4] = {others.x, others.y, others.z, others.w};
      const uint32_t weights = w.shared + p.norm + (c * kChunk + unit * 8) * 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 dy = unpack<T>(first[i]), x = unpack<T>(second[i]);
        const float2 g = load_shared2(weights + i * 8);
        sums[0] = fmaf(dy.x * x.x, g.x, sums[0]);
        sums[1] = fmaf(dy.y * x.y, g.y, sums[1]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 x = unpack<T>(first[i]);
        sums[0] = fmaf(x.x, x.x, sums[0]);
        sums[1] = fmaf(x.y, x.y, sums[1]);
      }
    }
  }
  row_sum += sums[0] + sums[1];
}

// From lanes l and l + 16, which have row l of the warp, to the lanes whose rows are lane / 4 and that + 8.
__device__ __forceinline__ void to_own_rows(float (&own)[2], float row_sum, int lane) {
  row_sum += __shfl_xor_sync(0xFFFFFFFFu, row_sum, 16);
  own[0] = __shfl_sync(0xFFFFFFFFu, row_sum, lane / 4);
  own[1] = __shfl_sync(0xFFFFFFFFu, row_sum, lane / 4 + 8);
}

// Where stage 1 finds the weights of wgmma step `step` of a chunk: rows of gate or of down along d, or of up
// along the ranks.
template <class S>
__device__ __forceinline__ uint32_t weights1(const Warpgroup<S> &w, uint32_t tile, int product,
                                             int step) {
  const int rank = w.half * S::kHeld;
  if constexpr (S::BACKWARD) {
    return low_word(tile + rank / 64 * (64 * 128) + rank % 64 * 2 + step * (16 * S::kUpRowBytes));
  } else {
    return low_word(tile + (product * S::MP + rank) * 128 + step * 32);
  }
}

// sums += rows of the tile times weights.
template <class T, class S>
__device__ __forceinline__ void multiply1(float (&sums)[S::kProducts][S::kWidth1 / 2], const Warpgroup<S> &w,
                                          uint32_t tile, uint32_t weights) {
  constexpr int kRowBytes = S::BACKWARD ? S::kUpRowBytes : 128;
  const uint32_t rows = low_word(tile + w.group * (kGroupRows * 128));
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
#pragma unroll
    for (int i = 0; i < S::kProducts; ++i) {
      wgmma<T, S::kWidth1, kRowBytes, S::BACKWARD>(sums[i], rows + 2 * k,
                                                   weights1<S>(w, weights, i, k));
    }
  }
  wgmma_commit();
}

// The same with the rows of other experts as zeros. (What is not finite in an expert's weights then reaches
// the whole row group.)
template <class T, class S>
__device__ __forceinline__ void multiply1_masked(float (&sums)[S::kProducts][S::kWidth1 / 2],
                                                 const Warpgroup<S> &w, const Routing &r, int expert,
                                                 uint32_t tile, uint32_t weights) {
  constexpr int kRowBytes = S::BACKWARD ? S::kUpRowBytes : 128;
#pragma unroll 1
  for (int k = 0; k < 4; ++k) {
    uint32_t rows[4];
    load_blocks(rows, w.block_at(tile, 2 * k));
    if (r.id[0] != expert) rows[0] = rows[2] = 0;
    if (r.id[1] != expert) rows[1] = rows[3] = 0;
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < S::kProducts; ++i) {
      wgmma<T, S::kWidth1, kRowBytes, S::BACKWARD>(sums[i], rows, weights1<S>(w, weights, i, k));
    }
    wgmma_commit();
    wgmma_wait<0>();
  }
}

// Partial sums of stage 1 over this block's columns. Leaves `input` at the chunk that stage 2 begins with.
template <class T, class S>
__device__ __forceinline__ void stage1(float (&sums)[S::kProducts][S::kWidth1 / 2], float (&row_sums)[2],
                                       const Arguments &a, const Warpgroup<S> &w, const Routing &r,
                                       Ring &input, Ring &weights) {
  const Plan &p = a.plan;
  const bool routed = S::ROUTED && (S::BACKWARD ? a.up_experts : a.experts) > 1;
  const Range experts = routed ? r.tile : Range{0};
  const bool sums_rows = w.half == 0 && a.norm_weight != nullptr &&
                         (!S::BACKWARD || a.residual == MMADAPT_RESIDUAL_NORM);
  const Chunks chunks = chunks_of(p, w.depth, S::kDepths);
  const bool at_once = frees_at_once(p);
  uint32_t last_input = 0, last_weights = 0;
  Ring ring = input;
#pragma unroll
  for (int i = 0; i < S::kProducts; ++i) clear(sums[i]);
  float row_sum = 0.0f;
#pragma unroll 1
  for (int n = 0; n < chunks.count; ++n) {
    if (n == chunks.leaving()) input = ring;
    ring.wait_full();
#pragma unroll 1
    for (int e = experts.low(); e <= experts.high(); ++e) {
      weights.wait_full();
      if (!routed || (r.wants(e) && r.pure())) {
        multiply1<T>(sums, w, ring.data(), weights.data());
        if (at_once) {
          wgmma_wait<0>();
        } else {
          wgmma_wait<1>();  // the product before: its stage is free
        }
      } else {
        wgmma_wait<0>();
        if (r.wants(e)) multiply1_masked<T>(sums, w, r, e, ring.data(), weights.data());
      }
      release(last_weights, w.lane);
      if (e == experts.low()) release(last_input, w.lane);
      last_weights = weights.empty_barrier();
      if (at_once) {
        release(last_weights, w.lane);
        last_weights = 0;
      }
      weights.advance();
    }
    if (sums_rows) {
      add_row_sums<T, S>(row_sum, a, w, ring.data(), chunks.stage1(n));
      __syncwarp();  // one lane releases the stage for all
    }
    last_input = n < chunks.leaving() ? ring.empty_barrier() : 0;
    if (at_once) {
      release(last_input, w.lane);
      last_input = 0;
    }
    ring.advance();
  }
  to_own_rows(row_sums, row_sum, w.lane);
  wgmma_wait<0>();
  release(last_weights, w.lane);
  release(last_input, w.lane);
#pragma unroll
  for (int i = 0; i < S::kProducts; ++i) wgmma_pin(sums[i]);
}

// What the result needs of this thread's two rows.
struct RowScalars {
  float rstd[2], pull[2];  // backward: pull = rstd x coefficient
};

template <class S>
__device__ __forceinline__ RowScalars row_scalars(const Arguments &a, const Warpgroup<S> &w, int tile) {
  RowScalars s = {{1.0f, 1.0f}, {0.0f, 0.0f}};
  if (a.norm_weight == nullptr) return s;
  const uint32_t from = w.scalars(a.plan) + w.pair() * 8;
  if constexpr (S::BACKWARD) {
    float2 coefficient = {0.0f, 0.0f};
    for (int g = 0; g < S::kAllGroups; ++g) {
      const float2 part = load_shared2(from + g * 256);
      coefficient.x += part.x, coefficient.y += part.y;
    }
    const int64_t row = int64_t(tile) * S::kRows + w.row();
    s.rstd[0] = row < a.tokens ? __ldg(a.rstd + row) : 0.0f;
    s.rstd[1] = row + 8 < a.tokens ? __ldg(a.rstd + row + 8) : 0.0f;
    s.pull[0] = s.rstd[0] * coefficient.x / a.dim;
    s.pull[1] = s.rstd[1] * coefficient.y / a.dim;
  } else {
    const float2 rstd = load_shared2(from);
    s.rstd[0] = rstd.x, s.rstd[1] = rstd.y;
  }
  return s;
}

// acc += stage 2's operand of one expert's rows times weights.
template <class T, class S>
__device__ __forceinline__ void multiply2(float (&acc)[S::kColumns2 / 2], const Plan &p,
                                          const Warpgroup<S> &w, const bool (&mine)[2],
                                          uint32_t weights) {
  constexpr int kMost = !S::ROUTED ? 8 : S::MP == 128 ? 1 : 2, kBatch = S::kSteps2 < kMost ? S::kSteps2 : kMost;
  constexpr int kRowBytes = S::BACKWARD ? 128 : S::kUpRowBytes;
  const uint32_t operand = w.hidden(p) + w.thread * 8;
  const int column = w.half * S::kColumns2;
#pragma unroll 1
  for (int first = 0; first < S::kSteps2; first += kBatch) {
    uint32_t h[kBatch][4];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const uint2 low = load_shared_words2(operand + (first + k) * (4 * kFragment));
      const uint2 high = load_shared_words2(operand + (first + k) * (4 * kFragment) + 2 * kFragment);
      h[k][0] = mine[0] ? low.x : 0, h[k][1] = mine[1] ? low.y : 0;
      h[k][2] = mine[0] ? high.x : 0, h[k][3] = mine[1] ? high.y : 0;
    }
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      uint32_t at;
      if constexpr (S::BACKWARD) {
        at = weights + (first + k) * (16 * 128) + column * 2;
      } else {
        at = weights + (first + k) / 4 * (64 * 128) + column * S::kUpRowBytes + (first + k) % 4 * 32;
      }
      wgmma<T, S::kColumns2, kRowBytes, S::BACKWARD>(acc, h[k], low_word(at));
    }
    wgmma_commit();
    if (first + kBatch < S::kSteps2) wgmma_wait<0>();
  }
}

// The result of one chunk, over the input's place.
//   forward   base + scale acc       backward   base + acc, or base + rstd (acc [+ dy weight] - x pull)
template <class T, class S, int RESIDUAL, bool NORM>
__device__ __forceinline__ void combine(const float (&acc)[S::kColumns2 / 2],
                                        const uint32_t (&in)[S::kColumns2 / 16][4],
                                        const Arguments &a, const Warpgroup<S> &w, uint32_t tile,
                                        uint32_t weights, const RowScalars &s) {
#pragma unroll
  for (int block = 0; block < S::kColumns2 / 16; ++block) {  // of 16 columns; the thread has four in a row
    const uint32_t at = w.block_at(tile, w.half * (S::kColumns2 / 8) + 2 * block);
    uint32_t second[4] = {}, out[4];
    if constexpr (S::BACKWARD && NORM) load_blocks(second, at + a.plan.input_bytes);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = i % 2;
      const float *sum = acc + 8 * block + 2 * i;
      float2 y = {sum[0], sum[1]}, base = {0.0f, 0.0f};
      if constexpr (RESIDUAL != MMADAPT_RESIDUAL_NONE) base = unpack<T>(in[block][i]);
      if constexpr (RESIDUAL == MMADAPT_RESIDUAL_NORM) {
        const float2 g = load_shared2(weights + (16 * block + i / 2 * 8) * 4);
        base.x *= g.x, base.y *= g.y;
        if constexpr (!S::BACKWARD) base.x *= s.rstd[row], base.y *= s.rstd[row];
      }
      if constexpr (!S::BACKWARD) {
        y.x = fmaf(y.x, a.scale, base.x);
        y.y = fmaf(y.y, a.scale, base.y);
      } else if constexpr (NORM) {
        const float2 x = unpack<T>(second[i]);
        y.x = fmaf(-x.x, s.pull[row], y.x);
        y.y = fmaf(-x.y, s.pull[row], y.y);
        if constexpr (RESIDUAL == MMADAPT_RESIDUAL_NORM) {
          y.x = s.rstd[row] * (y.x + base.x);
          y.y = s.rstd[row] * (y.y + base.y);
        } else {
          y.x = fmaf(y.x, s.rstd[row], base.x);
          y.y = fmaf(y.y, s.rstd[row], base.y);
        }
      } else {
        y.x += base.x, y.y += base.y;
      }
      out[i] = pack<T>(y.x, y.y);
    }
    store_blocks(at, out);
  }
}

// This thread's part of a chunk of the row group, in the layout of sums.
template <class S>
__device__ __forceinline__ void load_rows(uint32_t (&in)[S::kColumns2 / 16][4], const Warpgroup<S> &w,
                                          uint32_t tile) {
#pragma unroll
  for (int i = 0; i < S::kColumns2 / 16; ++i) {
    load_blocks(in[i], w.block_at(tile, w.half * (S::kColumns2 / 8) + 2 * i));
  }
}

// The result, chunk by chunk.
template <class T, class S>
__device__ __forceinline__ void stage2(const Arguments &a, const Warpgroup<S> &w, const Routing &r,
                                       int tile, Ring &input, Ring &weights) {
  const Plan &p = a.plan;
  const bool routed = S::ROUTED && (S::BACKWARD ? a.experts : a.up_experts) > 1;
  const Range experts = routed ? r.tile : Range{0};
  const RowScalars s = row_scalars(a, w, tile);
  const int row = tile * S::kRows + w.group * kGroupRows;
  const uint64_t policy = evict_first();
  const Chunks chunks = chunks_of(p, w.depth, S::kDepths);
  const bool stores = w.half == 0 && w.leads(), at_once = frees_at_once(p);
  uint32_t last_input = 0;
#pragma unroll 1
  for (int n = 0; n < chunks.count; ++n) {
    const int c = chunks.stage2(n);
    input.wait_full();
    float acc[S::kColumns2 / 2];
    clear(acc);
    uint32_t in[S::kColumns2 / 16][4];
#pragma unroll 1
    for (int e = experts.low(); e <= experts.high(); ++e) {
      weights.wait_full();
      if (!routed || r.wants(e)) {
        const bool mine[2] = {!routed || r.id[0] == e, !routed || r.id[1] == e};
        multiply2<T>(acc, p, w, mine, weights.data());
      }
      if constexpr (!S::ROUTED) load_rows(in, w, input.data());  // while the product runs
      wgmma_wait<0>();
      release(weights.empty_barrier(), w.lane);
      weights.advance();
    }
    wgmma_pin(acc);
    if constexpr (S::ROUTED) load_rows(in, w, input.data());
    if (S::ROUTED && !r.all) {  // tokens without expert are the base, whatever the weights hold
#pragma unroll
      for (int i = 0; i < S::kColumns2 / 2; ++i) {
        if (r.id[i / 2 % 2] < 0) acc[i] = 0.0f;
      }
    }
    const uint32_t columns =
        w.shared + p.norm + (c * kChunk + w.half * S::kColumns2 + w.lane % 4 * 2) * 4;
    if (a.residual == MMADAPT_RESIDUAL_NORM) {
      combine<T, S, MMADAPT_RESIDUAL_NORM, true>(acc, in, a, w, input.data(), columns, s);
    } else if (a.residual == MMADAPT_RESIDUAL_INPUT) {
      if (S::BACKWARD && a.norm_weight != nullptr) {
        combine<T, S, MMADAPT_RESIDUAL_INPUT, true>(acc, in, a, w, input.data(), columns, s);
      } else {
        combine<T, S, MMADAPT_RESIDUAL_INPUT, false>(acc, in, a, w, input.data(), columns, s);
      }
    } else if (S::BACKWARD && a.norm_weight != nullptr) {
      combine<T, S, MMADAPT_RESIDUAL_NONE, true>(acc, in, a, w, input.data(), columns, s);
    } else {
      combine<T, S, MMADAPT_RESIDUAL_NONE, false>(acc, in, a, w, input.data(), columns, s);
    }
    fence_async_proxy();
    named_barrier(1 + w.index / S::kHalves, S::kHalves * 128);
    if (stores) {
      tma_store(&a.output, input.data() + w.group * (kGroupRows * 128), chunk_column(p, c), row, policy);
      tma_commit();
      if (at_once) {
        tma_wait_read<0>();
        barrier_arrive(input.empty_barrier(), 4 * S::kHalves);
      } else {
        tma_wait_read<1>();
        if (last_input != 0) barrier_arrive(last_input, 4 * S::kHalves);
      }
    }
    last_input = at_once ? 0 : input.empty_barrier();
    input.advance();
  }
  if (stores && last_input != 0) {
    tma_wait_read<0>();
    barrier_arrive(last_input, 4 * S::kHalves);
  }
}

}  // namespace mmadapt::swiglu
