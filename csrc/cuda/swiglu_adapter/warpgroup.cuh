// What one warpgroup does with one tile of rows. Device functions of the kernel in
// swiglu_adapter_sm90.cu, in the order in which they run; the data flow is drawn there.
#pragma once

#include "load_weights.cuh"

namespace mmadapt::swiglu {

// The same value in every lane, and known to the compiler as such: wgmma under a branch that might
// diverge is serialised.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(0xFFFFFFFFu, value, 0); }

// Which experts a tile needs. Every warp of every block of the cluster finds the same.
struct Routing {
  int id;           // of token `lane` of this tile; -1: none
  int low, high;    // least and greatest id, -1 left out; 0 and 0 if there is no other
  uint32_t routed;  // bit t: token t has an expert
  __device__ __forceinline__ bool pure() const { return low == high; }
};

__device__ __forceinline__ Routing route(const Arguments &a, int64_t first_row, int lane) {
  Routing r = {0, 0, 0, 0xFFFFFFFFu};
  if (a.expert == nullptr) return r;
  r.id = first_row + lane < a.tokens ? __ldg(a.expert + first_row + lane) : -1;
  if (r.id >= a.experts) r.id = -1;  // against the contract; there is no room for such an expert
  r.routed = __ballot_sync(0xFFFFFFFFu, r.id >= 0);
  if (r.routed != 0) {
    r.low = __reduce_min_sync(0xFFFFFFFFu, r.id >= 0 ? r.id : a.experts);
    r.high = __reduce_max_sync(0xFFFFFFFFu, r.id);
  }
  r.low = uniform(r.low);
  r.high = uniform(r.high);
  return r;
}

template <class T>
__device__ __forceinline__ void store_one(uint32_t address, float value) {
  const T narrowed = narrow<T>(value);
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(address),
               "h"(*reinterpret_cast<const uint16_t *>(&narrowed))
               : "memory");
}
__device__ __forceinline__ void store_float(uint32_t address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}
__device__ __forceinline__ float load_float(uint32_t address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}
__device__ __forceinline__ int load_int(uint32_t address) {
  int value;
  asm volatile("ld.shared.s32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}

// Everything a warpgroup keeps from tile to tile.
struct Warpgroup {
  uint32_t shared;                                // this block's shared memory
  uint32_t hidden, sums, staging, scalars;        // this warpgroup's parts of it
  uint32_t sums_barrier, hidden_barrier;
  int index, thread, warp, lane;  // index of the warpgroup, thread 0..127
  int block;                      // rank in the cluster
  int log_pairs, log_owned;       // tokens a block owns, in pairs and one by one
  uint32_t parity;                // of both barriers
  // Where the sums of this thread's token pairs go: pair 4j + lane%4 of a tile.
  uint32_t peer_sums[kRows / 8], peer_barrier[kRows / 8];

  __device__ __forceinline__ int pairs() const { return 1 << log_pairs; }
  __device__ __forceinline__ int owned() const { return 1 << log_owned; }
  __device__ __forceinline__ uint32_t squares() const { return scalars; }
  __device__ __forceinline__ uint32_t row_scalars() const { return scalars + kRows * 4; }
  __device__ __forceinline__ uint32_t ids() const { return scalars + kRows * 8; }
  __device__ __forceinline__ uint32_t group_sums() const { return scalars + kRows * 12; }
};

template <int MP, bool BACKWARD>
__device__ __forceinline__ Warpgroup make_warpgroup(const Plan &p, uint32_t shared,
                                                    uint32_t sums_barrier, uint32_t hidden_barrier,
                                                    int index) {
  using S = Stage<MP, BACKWARD>;
  Warpgroup w;
  w.shared = shared;
  w.index = index;
  w.thread = threadIdx.x % 128;
  w.warp = uniform(w.thread / 32);
  w.lane = w.thread % 32;
  w.hidden = shared + p.hidden + index * p.hidden_bytes;
  w.sums = shared + p.sums + index * p.sums_bytes;
  w.staging = shared + p.staging + index * p.staging_bytes;
  w.scalars = shared + p.scalars + index * p.scalars_bytes;
  w.sums_barrier = sums_barrier;
  w.hidden_barrier = hidden_barrier;
  w.block = static_cast<int>(cluster_block());
  w.log_pairs = 31 - __clz(kPairs / p.cluster);
  w.log_owned = w.log_pairs + 1;
  w.parity = 0;
#pragma unroll
  for (int j = 0; j < kRows / 8; ++j) {
    const int pair = 4 * j + w.lane % 4, owner = pair >> w.log_pairs;
    const int place = (w.block << w.log_pairs) + (pair & (w.pairs() - 1));
    const uint32_t at = w.sums + place * (S::kBlocks1 * 128) + w.warp * 128 + w.lane / 4 * 16;
    w.peer_sums[j] = remote(at, owner);
    w.peer_barrier[j] = remote(sums_barrier, owner);
  }
  return w;
}

// W1 x^T of one expert over this block's columns, [rows of stage 1, 32 tokens]. At least two chains of
// products: one alone would wait for itself.
template <class T, int MP, bool BACKWARD>
__device__ __forceinline__ void multiply1(float (&sums)[Stage<MP, BACKWARD>::kProducts1][16],
                                          const Plan &p, uint32_t weights, uint32_t tile) {
  using S = Stage<MP, BACKWARD>;
  constexpr bool kSplit = S::kProducts1 == 1;
  const uint32_t chunk = p.experts1 * S::kRows1 * 128 >> 4;
  float second[16];
#pragma unroll
  for (int i = 0; i < S::kProducts1; ++i) clear(sums[i]);
  if constexpr (kSplit) clear(second);
  uint32_t left = k_major(weights), right = k_major(tile);
  for (int c = 0; c < p.chunks; ++c) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int i = 0; i < S::kProducts1; ++i) {
        wgmma<T, Layout::K128, Layout::K128, 1>(kSplit && k % 2 ? second : sums[i],
                                                left + i * (64 * 128 >> 4) + 2 * k, right + 2 * k);
      }
    }
    wgmma_commit();
    left += chunk;
    right += kRows * 128 >> 4;
  }
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < S::kProducts1; ++i) wgmma_pin(sums[i]);
  if constexpr (kSplit) {
    wgmma_pin(second);
#pragma unroll
    for (int n = 0; n < 16; ++n) sums[0][n] += second[n];
  }
}

// The same for every token with its own expert.
template <class T, int MP, bool BACKWARD>
__device__ __forceinline__ void stage1(float (&sums)[Stage<MP, BACKWARD>::kProducts1][16],
                                       const Arguments &a, const Warpgroup &w, const Routing &r,
                                       uint32_t tile) {
  using S = Stage<MP, BACKWARD>;
  const Plan &p = a.plan;
  const uint32_t weights = w.shared + p.weights1;
  if (p.experts1 == 1 || r.pure()) {
    const int expert = p.experts1 == 1 ? 0 : r.low;
    multiply1<T, MP, BACKWARD>(sums, p, weights + expert * (S::kRows1 * 128), tile);
    return;
  }
#pragma unroll
  for (int i = 0; i < S::kProducts1; ++i) clear(sums[i]);
  for (int e = r.low; e <= r.high; ++e) {
    float own[S::kProducts1][16];
    multiply1<T, MP, BACKWARD>(own, p, weights + e * (S::kRows1 * 128), tile);
    const uint32_t mine = __ballot_sync(0xFFFFFFFFu, r.id == e) >> (w.lane % 4 * 2);
#pragma unroll
    for (int i = 0; i < S::kProducts1; ++i) {
#pragma unroll
      for (int n = 0; n < 16; ++n) {
        if ((mine >> (n / 4 * 8 + n % 2)) & 1) sums[i][n] = own[i][n];
      }
    }
  }
}

// Sends the sums to the tokens' owners: block o of the cluster owns tokens 32/C o .. 32/C (o+1) - 1.
template <int MP, bool BACKWARD>
__device__ __forceinline__ void send_sums(
    const float (&sums)[Stage<MP, BACKWARD>::kProducts1][16], const Warpgroup &w) {
  using S = Stage<MP, BACKWARD>;
  // That a block's sums are there says that its warps are done with the tile before: of those that send.
  if constexpr (S::kBlocks1 < 4) named_barrier(1 + w.index, 128);
#pragma unroll
  for (int i = 0; i < S::kProducts1; ++i) {
    if (i * 4 + w.warp < S::kBlocks1) {
#pragma unroll
      for (int j = 0; j < kRows / 8; ++j) {
        const float4 v = {sums[i][4 * j], sums[i][4 * j + 1], sums[i][4 * j + 2], sums[i][4 * j + 3]};
        store_async(w.peer_sums[j] + i * 512, v, w.peer_barrier[j]);
      }
    }
  }
}

// Sums over this block's columns of x^2 (forward) or of dy x weight (backward, residual "norm"), by row.
template <class T, bool BACKWARD>
__device__ __forceinline__ void send_row_sums(const Arguments &a, const Warpgroup &w, uint32_t tile) {
  const Plan &p = a.plan;
  const int row = w.thread / 4, quarter = w.thread % 4;
  float sum = 0.0f;
  for (int c = 0; c < p.chunks; ++c) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int unit = 2 * quarter + k;
      const uint32_t at = tile + c * (kRows * 128) + swizzled(row, unit, 128);
      const uint4 first = load_shared_words(at);
      const uint32_t left[4] = {first.x, first.y, first.z, first.w};
      if constexpr (BACKWARD) {
        const uint4 second = load_shared_words(at + p.tile_bytes / 2);
        const uint32_t right[4] = {second.x, second.y, second.z, second.w};
        const uint32_t weight = w.shared + p.norm + (c * 64 + unit * 8) * 4;
        const float4 w0 = load_shared4(weight), w1 = load_shared4(weight + 16);
        const float weights[8] = {w0.x, w0.y, w0.z, w0.w, w1.x, w1.y, w1.z, w1.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 dy = unpack<T>(left[i]), x = unpack<T>(right[i]);
          sum += dy.x * x.x * weights[2 * i] + dy.y * x.y * weights[2 * i + 1];
        }
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 x = unpack<T>(left[i]);
          sum += x.x * x.x + x.y * x.y;
        }
      }
    }
  }
  sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
  sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 2);
  if (quarter == 0) {
    const int owner = row >> w.log_owned;
    const int place = (w.block << w.log_owned) + (row & (w.owned() - 1));
    store_async(remote(w.squares() + place * 4, owner), sum, remote(w.sums_barrier, owner));
  }
}

// The sum of a row scalar over the cluster, in the order of its blocks.
__device__ __forceinline__ float row_sum(const Arguments &a, const Warpgroup &w, int owned_token) {
  float sum = 0.0f;
  for (int s = 0; s < a.plan.cluster; ++s) {
    sum += load_float(w.squares() + ((s << w.log_owned) + owned_token) * 4);
  }
  return sum;
}

// Stage 2's operand: `value` in the slot of the token's expert, zero in the others.
template <class T, class S>
__device__ __forceinline__ void stage_value(const Warpgroup &w, const Routing &r, int owned_token,
                                            int column, int id, int slots, float value) {
  uint32_t to = w.staging + (owned_token * S::kDepth2 + column) * 2;
  if (slots == 1) {
    store_one<T>(to, value);
    return;
  }
  for (int slot = 0; slot < slots; ++slot) {
    store_one<T>(to, id - r.low == slot ? value : 0.0f);
    to += (S::kDepth2 * 2) << w.log_owned;
  }
}

__device__ __forceinline__ float sigmoid(float value) {
  return __fdividef(1.0f, 1.0f + __expf(-value));
}

// What a thread takes in the owner's turn: one rank of one owned token; where there are fewer of those than
// threads, two threads share one and each adds half of the blocks' parts. A warp has one token.
struct Entry {
  int token, rank;
  int first_part, parts;
  bool first;  // of the threads that share it
};

template <int MP>
__device__ __forceinline__ Entry make_entry(const Plan &p, const Warpgroup &w, int turn) {
  int entry = turn * 128 + w.thread, half = 0, halves = 1;
  if ((MP << w.log_owned) < 128) {
    halves = 2;
    half = w.lane >> 3 & 1;
    entry = w.warp * 16 + (w.lane >> 4) * 8 + w.lane % 8;
  }
  const int parts = p.cluster / halves;
  return {entry / MP, entry % MP, half * parts, parts, half == 0};
}

// A float at `from`, summed over the entry's parts, and over the threads that share it.
__device__ __forceinline__ float add_parts(const Warpgroup &w, const Entry &e, uint32_t from,
                                           uint32_t stride) {
  from += e.first_part * stride;
  float sum = 0.0f;
#pragma unroll 8
  for (int s = 0; s < e.parts; ++s) {
    sum += load_float(from);
    from += stride;
  }
  return sum;
}

template <class T, int MP>
__device__ __forceinline__ void activate_forward(const Arguments &a, const Warpgroup &w, const Entry &e,
                                                 const Routing &r, int row, int id, int slots,
                                                 float g, float d) {
  const bool inside = row < a.tokens;
  if (a.norm_weight != nullptr) {
    const float rstd = 1.0f / sqrtf(row_sum(a, w, e.token) / a.dim + a.eps);
    g *= rstd, d *= rstd;
    if (e.rank == 0 && e.first) {
      store_float(w.group_sums() + e.token * 16 * 4, rstd);
      if (inside) a.rstd[row] = rstd;
    }
  }
  if (id < 0) g = d = 0.0f;
  if (!e.first) return;
  stage_value<T, Stage<MP, false>>(w, r, e.token, e.rank, id, slots, g * sigmoid(g) * d);
  if (inside && e.rank < a.rank) {
    const int64_t at = int64_t(row) * a.rank + e.rank;
    static_cast<T *>(a.zg)[at] = narrow<T>(g);
    static_cast<T *>(a.zd)[at] = narrow<T>(d);
  }
}

template <class T, int MP>
__device__ __forceinline__ void activate_backward(const Arguments &a, const Warpgroup &w, const Entry &e,
                                                  const Routing &r, int id, int slots, float dh, float g,
                                                  float d) {
  const float s = sigmoid(g), silu = g * s;
  const bool on = id >= 0;
  dh *= a.scale;
  const float dg = on ? dh * d * (s + silu * (1.0f - s)) : 0.0f, dd = on ? dh * silu : 0.0f;
  if (e.first) {
    stage_value<T, Stage<MP, true>>(w, r, e.token, e.rank, id, slots, dg);
    stage_value<T, Stage<MP, true>>(w, r, e.token, MP + e.rank, id, slots, dd);
    const uint32_t h = w.staging + ((slots * 2 * MP * 2) << w.log_owned);
    store_one<T>(h + (e.token * MP + e.rank) * 2, on ? silu * d * a.scale : 0.0f);
  }
  if (a.norm_weight != nullptr) {
    float part = dg * g + dd * d;
#pragma unroll
    for (int lanes = 1; lanes < 8; lanes *= 2) part += __shfl_xor_sync(0xFFFFFFFFu, part, lanes);
    if (e.first && e.rank % 8 == 0) {
      store_float(w.group_sums() + (e.token * 16 + e.rank / 8) * 4, part);
    }
  }
}

// Owner's turn: adds the sums of all blocks in a fixed order and applies the activation. Leaves the
// operand of stage 2 in `staging`: [slots, owned tokens, K2], one slot an expert of the tile, zeros where
// a token is another expert's (so that what is not finite in an expert's `up` reaches its whole tile); backward also h, [owned tokens, MP], behind it.
template <class T, int MP, bool BACKWARD>
__device__ __forceinline__ void activate(const Arguments &a, const Warpgroup &w, const Routing &r,
                                         int first_row, int slots) {
  using S = Stage<MP, BACKWARD>;
  const int turns = max(1, (MP << w.log_owned) / 128);
  const uint32_t stride = (S::kBlocks1 * 128) << w.log_pairs;
  for (int turn = 0; turn < turns; ++turn) {
    const Entry e = make_entry<MP>(a.plan, w, turn);
    const int token = (w.block << w.log_owned) + e.token, row = first_row + token;
    const int id = a.expert == nullptr ? 0 : __shfl_sync(0xFFFFFFFFu, r.id, token);
    // Of a pair's 16-byte fragment entries: forward {gate, gate, down, down} of one rank and two tokens,
    // backward {dh, dh} of a rank and of the rank 8 above it.
    uint32_t from = w.sums + (e.token / 2) * (S::kBlocks1 * 128) + e.token % 2 * 4;
    if constexpr (BACKWARD) {
      from += (e.rank / 16 * 8 + e.rank % 8) * 16 + e.rank / 8 % 2 * 8;
      const bool ok = row < a.tokens && e.rank < a.rank;
      const int64_t at = int64_t(row) * a.rank + e.rank;
      const float g = ok ? widen(static_cast<const T *>(a.zg)[at]) : 0.0f;
      const float d = ok ? widen(static_cast<const T *>(a.zd)[at]) : 0.0f;
      if (turn == 0) barrier_wait(w.sums_barrier, w.parity);
      float dh = add_parts(w, e, from, stride);
      if (e.parts != a.plan.cluster) dh += __shfl_xor_sync(0xFFFFFFFFu, dh, 8);
      activate_backward<T, MP>(a, w, e, r, id, slots, dh, g, d);
    } else {
      from += e.rank * 16;
      if (turn == 0) barrier_wait(w.sums_barrier, w.parity);
      float g = add_parts(w, e, from, stride), d = add_parts(w, e, from + 8, stride);
      if (e.parts != a.plan.cluster) {
        g += __shfl_xor_sync(0xFFFFFFFFu, g, 8);
        d += __shfl_xor_sync(0xFFFFFFFFu, d, 8);
      }
      activate_forward<T, MP>(a, w, e, r, row, id, slots, g, d);
    }
  }
  if (a.expert != nullptr && w.warp == 0) {
    asm volatile("st.shared.s32 [%0], %1;" ::"r"(w.ids() + w.lane * 4), "r"(r.id) : "memory");
  }
}

// Sends the owned tokens' operand of stage 2, and a scalar a token behind a norm, to every block.
template <class T, int MP, bool BACKWARD>
__device__ __forceinline__ void broadcast(const Arguments &a, const Warpgroup &w, int first_row,
                                          int slots) {
  using S = Stage<MP, BACKWARD>;
  const Plan &p = a.plan;
  constexpr int kUnits = S::kDepth2 / 8, kPerPanel = S::kPanel / 8;
  const int log_units = 31 - __clz(kUnits << w.log_owned), units = 1 << log_units;
  const int first_to = w.thread >> log_units;
  const int step_to = max(1, 128 >> log_units);
  for (int u = w.thread & (units - 1); u < units; u += 128) {
    const int unit = u % kUnits, token = u / kUnits;
    uint32_t at = w.hidden + unit / kPerPanel * (kRows * S::kPanelBytes) +
                  swizzled((w.block << w.log_owned) + token, unit % kPerPanel, S::kPanelBytes);
    uint32_t from = w.staging + u * 16;
    for (int slot = 0; slot < slots; ++slot) {
      const uint4 v = load_shared_words(from);
      for (int to = first_to; to < p.cluster; to += step_to) {
        store_async(remote(at, to), v, remote(w.hidden_barrier, to));
      }
      at += S::kPanels * (kRows * S::kPanelBytes);
      from += units * 16;
    }
  }
  if (a.norm_weight == nullptr || w.thread >= kRows) return;  // one (block, owned token) a thread
  const int to = w.thread >> w.log_owned, token = w.thread & (w.owned() - 1);
  float value;
  if constexpr (BACKWARD) {  // mean of g x rstd over d, g the gradient behind the norm
    value = 0.0f;
    for (int g = 0; g < MP / 8; ++g) value += load_float(w.group_sums() + (token * 16 + g) * 4);
    if (a.residual == MMADAPT_RESIDUAL_NORM) {
      const int row = first_row + (w.block << w.log_owned) + token;
      value += row < a.tokens ? row_sum(a, w, token) * __ldg(a.rstd + row) : 0.0f;
    }
    value /= a.dim;
  } else {
    value = load_float(w.group_sums() + token * 16 * 4);
  }
  __syncwarp();  // all have read the row sums before the first is answered: then they may be written again
  store_async(remote(w.row_scalars() + ((w.block << w.log_owned) + token) * 4, to), value,
              remote(w.hidden_barrier, to));
}

// Eight numbers times a row's rstd.
template <class T>
__device__ __forceinline__ uint4 scaled(uint4 v, float by) {
  uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 two = unpack<T>(words[i]);
    words[i] = pack<T>(two.x * by, two.y * by);
  }
  return {words[0], words[1], words[2], words[3]};
}

// dz (times rstd) and h (times scale) of the owned tokens for the weights' gradients, from staging to
// global memory.
template <class T, int MP>
__device__ __forceinline__ void save_for_weights(const Arguments &a, const Warpgroup &w,
                                                 const Routing &r, int first_row, int slots) {
  const int per_row = a.rank / 8, owned = w.owned(), row0 = first_row + (w.block << w.log_owned);
  T *dz = static_cast<T *>(a.dz), *h = static_cast<T *>(a.h);
  const int dz_units = dz == nullptr ? 0 : owned * 2 * a.dz_experts * per_row;
  for (int i = w.thread; i < dz_units; i += 128) {
    const int unit = i % per_row, rest = i / per_row, expert = rest % a.dz_experts;
    const int half = rest / a.dz_experts % 2, token = rest / a.dz_experts / 2;
    int slot = expert == r.low || a.dz_experts == 1 ? 0 : -1;
    if (slots > 1) {
      const int id = load_int(w.ids() + ((w.block << w.log_owned) + token) * 4);
      slot = (a.dz_experts == 1 ? id : expert) - r.low;
    }
    if (row0 + token >= a.tokens) continue;
    uint4 v = {0, 0, 0, 0};
    if (slot >= 0 && slot < slots) {
      v = load_shared_words(w.staging + ((slot * owned + token) * 2 * MP + half * MP + unit * 8) * 2);
      if (a.norm_weight != nullptr) v = scaled<T>(v, __ldg(a.rstd + row0 + token));
    }
    const int64_t row = half * a.tokens + row0 + token;
    *reinterpret_cast<uint4 *>(dz + (row * a.dz_experts + expert) * a.rank + unit * 8) = v;
  }
  const uint32_t from = w.staging + slots * owned * 2 * MP * 2;
  const int h_units = h == nullptr ? 0 : owned * a.h_experts * per_row;
  for (int i = w.thread; i < h_units; i += 128) {
    const int unit = i % per_row, rest = i / per_row, expert = rest % a.h_experts;
    const int token = rest / a.h_experts;
    if (row0 + token >= a.tokens) continue;
    const bool mine = a.h_experts == 1 ||
                      load_int(w.ids() + ((w.block << w.log_owned) + token) * 4) == expert;
    uint4 v = {0, 0, 0, 0};
    if (mine) v = load_shared_words(from + (token * MP + unit * 8) * 2);
    const int64_t row = row0 + token;
    *reinterpret_cast<uint4 *>(h + (row * a.h_experts + expert) * a.rank + unit * 8) = v;
  }
}

// What the row needs in the result, of the tokens in this thread's fragments: 8j + 2 (lane%4) + {0, 1}.
struct RowScalars {
  float rstd[kRows / 4], pull[kRows / 4];  // backward: pull = rstd x coefficient
};

// A chunk of the input in fragment layout, the columns and tokens of D2's.
struct Chunk {
  uint32_t words[2][4];
};
__device__ __forceinline__ uint32_t chunk_address(const Warpgroup &w, uint32_t chunk, int half) {
  const int row = 16 * half + w.lane / 16 * 8 + w.lane % 8, unit = 2 * w.warp + w.lane / 8 % 2;
  return chunk + swizzled(row, unit, 128);
}
__device__ __forceinline__ void load_chunk(Chunk &chunk, const Warpgroup &w, uint32_t at) {
  load_transposed(chunk.words[0], chunk_address(w, at, 0));
  load_transposed(chunk.words[1], chunk_address(w, at, 1));
}

// One 64-column chunk of the result, over the input's place in shared memory.
//   forward   base + scale D2       backward   base + D2, or base + rstd (D2 [+ dy weight] - x pull)
template <class T, bool BACKWARD, int RESIDUAL, bool NORM>
__device__ __forceinline__ void write_chunk(const float (&acc)[16], const Chunk &in, const Chunk &second,
                                            const Arguments &a, const Warpgroup &w, uint32_t at,
                                            uint32_t weights, const RowScalars &s) {
  float weight[2] = {1.0f, 1.0f};
  if constexpr (RESIDUAL == MMADAPT_RESIDUAL_NORM) {
    const uint32_t first = weights + (w.warp * 16 + w.lane / 4) * 4;
    weight[0] = load_float(first), weight[1] = load_float(first + 32);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t out[4];
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const int t = 4 * half + m / 2 * 2;  // index of the first of this thread's two tokens
      float y[2] = {acc[8 * half + 2 * m], acc[8 * half + 2 * m + 1]};
      float2 base = {0.0f, 0.0f};
      if constexpr (RESIDUAL != MMADAPT_RESIDUAL_NONE) base = unpack<T>(in.words[half][m]);
      if constexpr (RESIDUAL == MMADAPT_RESIDUAL_NORM) base.x *= weight[m % 2], base.y *= weight[m % 2];
      if constexpr (!BACKWARD) {
        if constexpr (RESIDUAL == MMADAPT_RESIDUAL_NORM) base.x *= s.rstd[t], base.y *= s.rstd[t + 1];
        y[0] = fmaf(y[0], a.scale, base.x);
        y[1] = fmaf(y[1], a.scale, base.y);
      } else if constexpr (NORM) {
        const float2 x = unpack<T>(second.words[half][m]);
        y[0] = fmaf(-x.x, s.pull[t], y[0]);
        y[1] = fmaf(-x.y, s.pull[t + 1], y[1]);
        if constexpr (RESIDUAL == MMADAPT_RESIDUAL_NORM) {
          y[0] = s.rstd[t] * (y[0] + base.x);
          y[1] = s.rstd[t + 1] * (y[1] + base.y);
        } else {
          y[0] = fmaf(y[0], s.rstd[t], base.x);
          y[1] = fmaf(y[1], s.rstd[t + 1], base.y);
        }
      } else {
        y[0] += base.x, y[1] += base.y;
      }
      out[m] = pack<T>(y[0], y[1]);
    }
    store_transposed(chunk_address(w, at, half), out);
  }
}

template <class T, bool BACKWARD>
__device__ __forceinline__ void write_chunk(float (&acc)[16], const Chunk &in, const Chunk &second,
                                            const Arguments &a, const Warpgroup &w, const Routing &r,
                                            uint32_t tile, int c, const RowScalars &s) {
  if (r.routed != 0xFFFFFFFFu) {  // tokens without expert are the base, whatever the weights hold
    const uint32_t routed = r.routed >> (w.lane % 4 * 2);
#pragma unroll
    for (int n = 0; n < 16; ++n) {
      if (!((routed >> (n / 4 * 8 + n % 2)) & 1)) acc[n] = 0.0f;
    }
  }
  const uint32_t at = tile + c * (kRows * 128), weights = w.shared + a.plan.norm + c * 256;
  const bool norm = BACKWARD && a.norm_weight != nullptr;
  if (a.residual == MMADAPT_RESIDUAL_NORM) {
    write_chunk<T, BACKWARD, MMADAPT_RESIDUAL_NORM, BACKWARD>(acc, in, second, a, w, at, weights, s);
  } else if (a.residual == MMADAPT_RESIDUAL_INPUT) {
    if (norm) {
      write_chunk<T, BACKWARD, MMADAPT_RESIDUAL_INPUT, true>(acc, in, second, a, w, at, weights, s);
    } else {
      write_chunk<T, BACKWARD, MMADAPT_RESIDUAL_INPUT, false>(acc, in, second, a, w, at, weights, s);
    }
  } else if (norm) {
    write_chunk<T, BACKWARD, MMADAPT_RESIDUAL_NONE, true>(acc, in, second, a, w, at, weights, s);
  } else {
    write_chunk<T, BACKWARD, MMADAPT_RESIDUAL_NONE, false>(acc, in, second, a, w, at, weights, s);
  }
}

// W2 times one slot of the operand, for two chunks of 64 columns. `KEEP`: adds to the sums.
template <class T, int MP, bool BACKWARD, int KEEP>
__device__ __forceinline__ void multiply2(float (&even)[16], float (&odd)[16], uint32_t left,
                                          uint32_t right, uint32_t panel_bytes) {
  using S = Stage<MP, BACKWARD>;
  constexpr Layout kLayout = S::kPanelBytes == 128 ? Layout::K128 : Layout::K64;
#pragma unroll
  for (int panel = 0; panel < S::kPanels; ++panel) {
#pragma unroll
    for (int k = 0; k < S::kPanel / 16; ++k) {
      if (panel == 0 && k == 0) {
        wgmma<T, kLayout, kLayout, KEEP>(even, left, right);
        wgmma<T, kLayout, kLayout, KEEP>(odd, left + (64 * S::kPanelBytes >> 4), right);
      } else {
        wgmma<T, kLayout, kLayout, 1>(even, left + 2 * k, right + 2 * k);
        wgmma<T, kLayout, kLayout, 1>(odd, left + (64 * S::kPanelBytes >> 4) + 2 * k, right + 2 * k);
      }
    }
    left += panel_bytes >> 4;
    right += kRows * S::kPanelBytes >> 4;
  }
}

// D2 [columns, 32 tokens], two chunks of 64 columns at a time, and the result.
template <class T, int MP, bool BACKWARD>
__device__ __forceinline__ void stage2(const Arguments &a, const Warpgroup &w, const Routing &r,
                                       uint32_t tile, int first_row, int slots) {
  using S = Stage<MP, BACKWARD>;
  const Plan &p = a.plan;
  Chunk in[2], second[2];  // loaded while the operand travels and while the products run
  const auto load = [&](int c) {
    const uint32_t at = tile + c * (kRows * 128);
    load_chunk(in[0], w, at);
    load_chunk(in[1], w, at + kRows * 128);
    if (BACKWARD && a.norm_weight != nullptr) {
      load_chunk(second[0], w, at + p.tile_bytes / 2);
      load_chunk(second[1], w, at + p.tile_bytes / 2 + kRows * 128);
    }
  };
  load(0);
  barrier_wait(w.hidden_barrier, w.parity);
  fence_async_proxy();
  RowScalars s;
  if (a.norm_weight != nullptr) {
#pragma unroll
    for (int i = 0; i < kRows / 4; ++i) {
      const int token = i / 2 * 8 + w.lane % 4 * 2 + i % 2;
      const float sent = load_float(w.row_scalars() + token * 4);
      s.rstd[i] = sent;
      if constexpr (BACKWARD) {
        s.rstd[i] = first_row + token < a.tokens ? __ldg(a.rstd + first_row + token) : 0.0f;
        s.pull[i] = s.rstd[i] * sent;
      }
    }
  }
  const uint32_t panel_bytes = p.columns * S::kPanelBytes;
  const uint32_t first = w.shared + p.weights2 + (p.experts2 == 1 ? 0 : r.low) * S::kPanels * panel_bytes;
  for (int c = 0; c < p.chunks; c += 2) {
    // Where the number of chunks is odd, the last odd one reads past the panel and is not used.
    float even[16], odd[16];
    uint32_t left = k_major(first + c * (64 * S::kPanelBytes)), right = k_major(w.hidden);
    wgmma_fence();
    multiply2<T, MP, BACKWARD, 0>(even, odd, left, right, panel_bytes);
    wgmma_commit();
    for (int slot = 1; slot < slots; ++slot) {
      left += S::kPanels * panel_bytes >> 4;
      right += S::kPanels * kRows * S::kPanelBytes >> 4;
      wgmma_fence();
      multiply2<T, MP, BACKWARD, 1>(even, odd, left, right, panel_bytes);
      wgmma_commit();
    }
    if (c > 0) load(c);
    wgmma_wait<0>();
    wgmma_pin(even);
    wgmma_pin(odd);
    write_chunk<T, BACKWARD>(even, in[0], second[0], a, w, r, tile, c, s);
    if (c + 1 < p.chunks) write_chunk<T, BACKWARD>(odd, in[1], second[1], a, w, r, tile, c + 1, s);
  }
}

}  // namespace mmadapt::swiglu
