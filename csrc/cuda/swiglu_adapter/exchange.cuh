// Between the stages: partial sums to their owners, activation, and the operand of stage 2 to all blocks.
//
// For every row group the sums of 8 ranks have one owner: group j of ranks belongs to block j mod C, in round
// j / C. Everything travels as fragments, thread to thread of the same index, so nothing is rearranged.
//
// Why nobody overwrites what another still reads: a block sends the sums of a round after it has the whole
// operand of the round before, that is after every owner has read those sums; and an owner sends an operand
// after it has all sums, that is after every warpgroup of that row group is done with the tile before.
#pragma once

#include "warpgroup.cuh"

namespace mmadapt::swiglu {

// An address in a block's shared memory, in this one without a detour.
__device__ __forceinline__ uint32_t peer(uint32_t address, int to, int me) {
  return to == me ? address : remote(address, to);
}

template <class S>
struct Exchange {
  int cluster, log_cluster, sources, rounds, own_rounds;
  bool owns, row_sums;  // row_sums: of x^2, or of dy x weight
  uint32_t first_bytes, later_bytes;  // of sums that an owner receives in round 0, in others

  // Bytes of the operand, and of a scalar a row behind a norm, that a row group receives in a round.
  __device__ __forceinline__ uint32_t hidden_bytes(int round, bool norm) const {
    const int groups = min(cluster, S::kGroups - (round << log_cluster)) * S::kHalves;
    const uint32_t scalars = !norm ? 0 : S::BACKWARD ? groups * 256 : round == 0 ? 256 : 0;
    return groups * S::kOperands * 2 * kFragment + scalars;
  }
  __device__ __forceinline__ uint32_t sums_bytes(int round) const {
    return round == 0 ? first_bytes : later_bytes;
  }
};

template <class S>
__device__ __forceinline__ Exchange<S> make_exchange(const Arguments &a, const Warpgroup<S> &w) {
  Exchange<S> x;
  const Plan &p = a.plan;
  x.cluster = p.cluster;
  x.log_cluster = 31 - __clz(p.cluster);
  x.sources = p.cluster * S::kDepths;
  x.rounds = (S::kGroups + p.cluster - 1) >> x.log_cluster;
  x.own_rounds = (S::kGroups - w.block + p.cluster - 1) >> x.log_cluster;
  x.owns = w.depth == 0 && x.own_rounds > 0;
  x.row_sums = a.norm_weight != nullptr && (!S::BACKWARD || a.residual == MMADAPT_RESIDUAL_NORM);
  x.later_bytes = p.sums_bytes;
  x.first_bytes = p.sums_bytes + (x.row_sums ? x.sources * 256 : 0);
  return x;
}

// Announces what an owner will receive.
template <class S>
__device__ __forceinline__ void expect_sums(const Plan &p, const Warpgroup<S> &w,
                                            const Exchange<S> &x, int round) {
  if (w.leads()) barrier_expect(w.sums_barrier(p), x.sums_bytes(round));
}

template <class S>
__device__ __forceinline__ void expect_first(const Arguments &a, const Warpgroup<S> &w) {
  const Plan &p = a.plan;
  const Exchange<S> x = make_exchange(a, w);
  if (x.owns) expect_sums(p, w, x, 0);
  if (w.split == 0 && w.leads()) {
    barrier_expect(w.hidden_barrier(p), x.hidden_bytes(0, a.norm_weight != nullptr));
  }
}

// This round's sums to their owners; leaves those of this block's group in `own`.
template <class S>
__device__ __forceinline__ void send_sums(float4 (&own)[S::kSums],
                                          const float (&sums)[S::kProducts][S::kWidth1 / 2], const Plan &p,
                                          const Warpgroup<S> &w, const Exchange<S> &x, int round) {
  const uint32_t place = w.shared + p.sums + w.owner() * p.sums_bytes + w.thread * 16;
  const int source = w.block * S::kDepths + w.depth;
#pragma unroll
  for (int j = 0; j < S::kGroups; ++j) {
    if (j >> x.log_cluster != round) continue;
    const int to = j & (x.cluster - 1);
    const bool keep = to == w.block && w.depth == 0;
    // An owner keeps no place for itself.
    const int slot = source < to * S::kDepths ? source : source - 1;
    const uint32_t at = peer(place + slot * (S::kSums * 4 * kFragment), to, w.block);
    const uint32_t barrier = peer(w.sums_barrier(p), to, w.block);
#pragma unroll
    for (int sum = 0; sum < S::kSums; ++sum) {
      const float *v = S::kProducts == 2 ? sums[sum] + 4 * j : sums[0] + sum * (S::kHeld / 2) + 4 * j;
      const float4 four = {v[0], v[1], v[2], v[3]};
      if (keep) {
        own[sum] = four;
      } else {
        store_async(at + sum * (4 * kFragment), four, barrier);
      }
    }
  }
}

__device__ __forceinline__ void sum_quad(float (&v)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    v[i] += __shfl_xor_sync(0xFFFFFFFFu, v[i], 1);
    v[i] += __shfl_xor_sync(0xFFFFFFFFu, v[i], 2);
  }
}
__device__ __forceinline__ uint2 as_words(const float (&v)[2]) {
  return {__float_as_uint(v[0]), __float_as_uint(v[1])};
}

// One number a row to every owner of sums of this row group.
template <class S>
__device__ __forceinline__ void send_row_sums(const float (&row_sums)[2], const Plan &p,
                                              const Warpgroup<S> &w, const Exchange<S> &x) {
  if (w.half != 0 || w.lane % 4 != 0) return;
  const int source = w.block * S::kDepths + w.depth;
  for (int to = 0; to < min(x.cluster, S::kGroups); ++to) {
#pragma unroll
    for (int half = 0; half < S::kHalves; ++half) {
      const int owner = w.group * S::kHalves + half;
      const uint32_t at = w.shared + p.row_sums + (owner * x.sources + source) * 256;
      const uint32_t barrier = w.sums_barrier(p) + 8 * half;  // w.half is 0
      store_async(peer(at + w.pair() * 8, to, w.block), as_words(row_sums),
                  peer(barrier, to, w.block));
    }
  }
}

// The sums of all sources, in their order.
template <class S>
__device__ __forceinline__ void add_sums(float4 (&total)[S::kSums], const float4 (&own)[S::kSums],
                                         const Plan &p, const Warpgroup<S> &w, const Exchange<S> &x) {
  uint32_t from = w.shared + p.sums + w.owner() * p.sums_bytes + w.thread * 16;
  const int me = w.block * S::kDepths;
#pragma unroll
  for (int sum = 0; sum < S::kSums; ++sum) total[sum] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
  for (int source = 0; source < x.sources; ++source) {
#pragma unroll
    for (int sum = 0; sum < S::kSums; ++sum) {
      const float4 v = source == me ? own[sum] : load_shared4(from + sum * (4 * kFragment));
      total[sum].x += v.x, total[sum].y += v.y, total[sum].z += v.z, total[sum].w += v.w;
    }
    if (source != me) from += S::kSums * 4 * kFragment;
  }
}

template <class S>
__device__ __forceinline__ float2 add_row_totals(const Plan &p, const Warpgroup<S> &w,
                                                 const Exchange<S> &x) {
  float2 total = {0.0f, 0.0f};
  uint32_t from = w.shared + p.row_sums + w.owner() * x.sources * 256 + w.pair() * 8;
  for (int source = 0; source < x.sources; ++source) {
    const float2 v = load_shared2(from);
    total.x += v.x, total.y += v.y;
    from += 256;
  }
  return total;
}

// `operand` of group `g` of all ranks to every block.
template <class S>
__device__ __forceinline__ void send_operand(const uint2 (&operand)[S::kOperands], const Plan &p,
                                             const Warpgroup<S> &w, const Exchange<S> &x, int g) {
  const uint32_t at = w.hidden(p) + g * (2 * kFragment) + w.thread * 8;
  for (int to = 0; to < x.cluster; ++to) {
    const uint32_t there = peer(at, to, w.block), barrier = peer(w.hidden_barrier(p), to, w.block);
#pragma unroll
    for (int i = 0; i < S::kOperands; ++i) {
      store_async(there + i * (S::kAllGroups * 2 * kFragment), operand[i], barrier);
    }
  }
}

template <class S>
__device__ __forceinline__ void send_scalars(const float (&v)[2], const Plan &p, const Warpgroup<S> &w,
                                             const Exchange<S> &x, int g) {
  if (w.lane % 4 != 0) return;
  const uint32_t at = w.scalars(p) + g * 256 + w.pair() * 8;
  for (int to = 0; to < x.cluster; ++to) {
    store_async(peer(at, to, w.block), as_words(v), peer(w.hidden_barrier(p), to, w.block));
  }
}

__device__ __forceinline__ float sigmoid(float value) {
  return __fdividef(1.0f, 1.0f + __expf(-value));
}

// An owner's 8 ranks: the thread has two of them, at `rank`, in each of its two rows.
struct Place {
  int64_t row;  // and row + 8
  int rank;
  bool ok[2];   // the row exists, and the ranks do
};

template <class T>
__device__ __forceinline__ void save_pair(void *rows, int64_t at, float first, float second) {
  *reinterpret_cast<uint32_t *>(static_cast<T *>(rows) + at) = pack<T>(first, second);
}

// Forward: z, h. total: sums of gate and of down.
template <class T, class S>
__device__ __forceinline__ void activate_forward(const float4 (&total)[S::kSums],
                                                 const float (&row_totals)[2], const Arguments &a,
                                                 const Warpgroup<S> &w, const Routing &r,
                                                 const Exchange<S> &x, int g, const Place &at) {
  float gate[4] = {total[0].x, total[0].y, total[0].z, total[0].w};
  float down[4] = {total[1].x, total[1].y, total[1].z, total[1].w}, h[4];
  float rstd[2] = {1.0f, 1.0f};
  if (a.norm_weight != nullptr) {
#pragma unroll
    for (int i = 0; i < 2; ++i) rstd[i] = 1.0f / sqrtf(row_totals[i] / a.dim + a.eps);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool on = r.id[i / 2] >= 0;
    gate[i] = on ? gate[i] * rstd[i / 2] : 0.0f;
    down[i] = on ? down[i] * rstd[i / 2] : 0.0f;
    h[i] = gate[i] * sigmoid(gate[i]) * down[i];
  }
  send_operand<S>({{pack<T>(h[0], h[1]), pack<T>(h[2], h[3])}}, a.plan, w, x, g);
  if (a.norm_weight != nullptr && g == 0) {
    send_scalars(rstd, a.plan, w, x, 0);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (w.lane % 4 == 0 && at.row + 8 * i < a.tokens) a.rstd[at.row + 8 * i] = rstd[i];
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (!at.ok[i]) continue;
    const int64_t to = (at.row + 8 * i) * a.rank + at.rank;
    save_pair<T>(a.zg, to, gate[2 * i], gate[2 * i + 1]);
    save_pair<T>(a.zd, to, down[2 * i], down[2 * i + 1]);
  }
}

// A pair of each row, to the columns of its expert; zeros to those of others.
template <class T>
__device__ __forceinline__ void save_spread(void *rows, int64_t first_row, int experts,
                                            const Arguments &a, const Routing &r, const Place &at,
                                            const float (&v)[4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (!at.ok[i]) continue;
    for (int e = 0; e < experts; ++e) {
      const bool mine = experts == 1 || r.id[i] == e;
      save_pair<T>(rows, ((first_row + at.row + 8 * i) * experts + e) * a.rank + at.rank,
                   mine ? v[2 * i] : 0.0f, mine ? v[2 * i + 1] : 0.0f);
    }
  }
}

// The saved z of an owner's ranks, asked for before the sums are there.
struct Saved {
  uint32_t gate[2], down[2];
};

template <class T>
__device__ __forceinline__ Saved load_saved(const Arguments &a, const Place &at) {
  Saved z = {};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (!at.ok[i]) continue;
    const int64_t from = (at.row + 8 * i) * a.rank + at.rank;
    z.gate[i] = __ldg(reinterpret_cast<const uint32_t *>(static_cast<const T *>(a.zg) + from));
    z.down[i] = __ldg(reinterpret_cast<const uint32_t *>(static_cast<const T *>(a.zd) + from));
  }
  return z;
}

// Backward: dz, and for the weights' gradients dz and h. total: sums of dh.
template <class T, class S>
__device__ __forceinline__ void activate_backward(const float4 (&total)[S::kSums],
                                                  const float (&row_totals)[2], const Saved &z,
                                                  const Arguments &a, const Warpgroup<S> &w,
                                                  const Routing &r, const Exchange<S> &x, int g,
                                                  const Place &at) {
  const float dh[4] = {total[0].x, total[0].y, total[0].z, total[0].w};
  float dgate[4], ddown[4], h[4], part[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 gates = unpack<T>(z.gate[i / 2]), downs = unpack<T>(z.down[i / 2]);
    const float gate = i % 2 ? gates.y : gates.x, down = i % 2 ? downs.y : downs.x;
    const float s = sigmoid(gate), silu = gate * s, own = dh[i] * a.scale;
    const bool on = r.id[i / 2] >= 0;
    dgate[i] = on ? own * down * (s + silu * (1.0f - s)) : 0.0f;
    ddown[i] = on ? own * silu : 0.0f;
    h[i] = on ? silu * down * a.scale : 0.0f;
    part[i / 2] += dgate[i] * gate + ddown[i] * down;
  }
  send_operand<S>({{pack<T>(dgate[0], dgate[1]), pack<T>(dgate[2], dgate[3])},
                   {pack<T>(ddown[0], ddown[1]), pack<T>(ddown[2], ddown[3])}},
                  a.plan, w, x, g);
  float rstd[2] = {1.0f, 1.0f};
  if (a.norm_weight != nullptr) {
    sum_quad(part);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      rstd[i] = at.row + 8 * i < a.tokens ? __ldg(a.rstd + at.row + 8 * i) : 0.0f;
      if (g == 0) part[i] += row_totals[i] * rstd[i];
    }
    send_scalars(part, a.plan, w, x, g);
  }
  if (a.dz != nullptr) {
#pragma unroll
    for (int i = 0; i < 4; ++i) dgate[i] *= rstd[i / 2], ddown[i] *= rstd[i / 2];
    save_spread<T>(a.dz, 0, a.dz_experts, a, r, at, dgate);
    save_spread<T>(a.dz, a.tokens, a.dz_experts, a, r, at, ddown);
  }
  if (a.h != nullptr) save_spread<T>(a.h, 0, a.h_experts, a, r, at, h);
}

template <class T, class S>
__device__ __forceinline__ void exchange(const float (&sums)[S::kProducts][S::kWidth1 / 2],
                                         const float (&row_sums)[2], const Arguments &a, Warpgroup<S> &w,
                                         const Routing &r, int tile) {
  const Plan &p = a.plan;
  const Exchange<S> x = make_exchange(a, w);
  const bool norm = a.norm_weight != nullptr;
  float row_totals[2] = {0.0f, 0.0f};
  for (int round = 0; round < x.rounds; ++round) {
    float4 own[S::kSums] = {};
    send_sums(own, sums, p, w, x, round);
    if (x.row_sums && round == 0) send_row_sums(row_sums, p, w, x);
    if (x.owns && round < x.own_rounds) {
      const int g = w.half * S::kGroups + (round << x.log_cluster) + w.block;
      const int64_t row = int64_t(tile) * S::kRows + w.row();
      const int rank = g * 8 + w.lane % 4 * 2;
      const Place at = {row, rank, {row < a.tokens && rank < a.rank, row + 8 < a.tokens && rank < a.rank}};
      Saved z = {};
      if constexpr (S::BACKWARD) z = load_saved<T>(a, at);
      barrier_wait(w.sums_barrier(p), w.sums_parity);
      w.sums_parity ^= 1;
      expect_sums(p, w, x, round + 1 < x.own_rounds ? round + 1 : 0);
      float4 total[S::kSums];
      add_sums(total, own, p, w, x);
      if (x.row_sums && round == 0) {
        const float2 v = add_row_totals(p, w, x);
        row_totals[0] = v.x, row_totals[1] = v.y;
      }
      if constexpr (S::BACKWARD) {
        activate_backward<T>(total, row_totals, z, a, w, r, x, g, at);
      } else {
        activate_forward<T>(total, row_totals, a, w, r, x, g, at);
      }
    }
    barrier_wait(w.hidden_barrier(p), w.hidden_parity);
    w.hidden_parity ^= 1;
    if (w.split == 0 && w.leads()) {
      barrier_expect(w.hidden_barrier(p), x.hidden_bytes(round + 1 < x.rounds ? round + 1 : 0, norm));
    }
  }
}

}  // namespace mmadapt::swiglu
