// What is made of the sums x factor_in^T: z and, for each weight of a group, core_k = scale * z M_k with
// dropout. Host and device.
#pragma once

#include <cstdint>

#include "mmadapt/cp_linear_cuda.h"

namespace mmadapt::cp_linear {

struct Cores {
  int64_t tokens;
  int rank, count;
  int wide;  // bit k: mode k is fp32
  int dropout, threshold;
  float kept, scale;
  const void *mode[MMADAPT_CP_LINEAR_MAX_GROUP];
  const int64_t *seeds;
  void *z, *core;
};

// Of a call: mmadapt_cp_linear_project_sm90 and mmadapt_cp_linear_fused_sm90 name these fields alike.
template <class Call>
Cores cores_of(const Call &p) {
  Cores c = {};
  c.tokens = p.tokens;
  c.rank = p.rank;
  c.count = p.count;
  c.wide = p.wide;
  c.dropout = p.dropout;
  c.threshold = p.threshold;
  c.kept = p.kept;
  c.scale = p.scale;
  for (int k = 0; k < p.count; ++k) c.mode[k] = p.mode[k];
  c.seeds = p.seeds;
  c.z = p.z;
  c.core = p.core;
  return c;
}

// The constraint on those fields that fails, or null.
template <class Call>
const char *cores_refusal(const Call &p) {
  if (p.count < 1 || p.count > MMADAPT_CP_LINEAR_MAX_GROUP) return "count: expected 1 to 8";
  if (p.dropout < MMADAPT_DROPOUT_NONE || p.dropout > MMADAPT_DROPOUT_AFTER) {
    return "dropout: out of range";
  }
  if (p.dropout != MMADAPT_DROPOUT_NONE && p.seeds == nullptr) return "seeds: absent, with dropout";
  return nullptr;
}

}  // namespace mmadapt::cp_linear
