// CUDA: the value gate, y[t, h, :] = value[t, h, :] * tanh(logits[t, h]) where mask[t].
//
// Other rows pass unchanged, bitwise. Arrays are contiguous and row-major; arithmetic is fp32.
// logits: [heads], or [tokens, heads] (per_token), or projected: logits[t] = weight hidden[t].
#ifndef MMADAPT_MODALITY_GATE_H
#define MMADAPT_MODALITY_GATE_H

#include "mmadapt/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int64_t tokens, heads, size;
  int32_t dtype, logits_dtype;  // mmadapt_dtype; of the logits: the same or F32
  int32_t per_token;
  const void *value;    // [tokens, heads, size]
  const void *logits;   // [heads] or [tokens, heads]
  const uint8_t *mask;  // [tokens]
  void *y;              // like value; value itself: in place, other rows are not touched
  void *saved;          // null, or like value: its masked rows, other rows are not written
  void *stream;
} mmadapt_modality_gate_forward;

typedef struct {
  int64_t tokens, heads, size;  // heads: at most 1024
  int64_t part_tokens;          // tokens whose share of dlogits [heads] is one part
  int32_t dtype, logits_dtype, per_token;
  const void *dy, *value;  // value: as before the gate; only masked rows are read
  const void *logits;
  const uint8_t *mask;
  void *dvalue;   // null: not needed, as below
  void *dlogits;  // like logits
  float *parts;   // [ceil(tokens / part_tokens), heads], for dlogits [heads]
  void *stream;
} mmadapt_modality_gate_backward;

typedef struct {
  int64_t tokens, heads, size, width;
  int32_t dtype, weight_dtype;  // of the weight: the same or F32
  const void *value;
  const void *hidden;  // [tokens, width]
  const void *weight;  // [heads, width]
  const uint8_t *mask;
  void *y;      // as above
  float *gate;  // [tokens, heads]: tanh(logits), 0 outside the mask
  void *saved;  // as above
  void *stream;
} mmadapt_projected_modality_gate_forward;

typedef struct {
  int64_t tokens, heads, size, width;  // heads: at most 1024
  int32_t dtype, weight_dtype;
  const void *dy, *value, *hidden, *weight;
  const uint8_t *mask;
  const float *gate;  // of the forward
  void *dlogits;      // [heads, tokens rounded up to a multiple of 8], like dy: scratch, for dweight
  void *dvalue;       // null: not needed, as below
  void *dhidden;      // [tokens, width], 0 outside the mask
  void *dweight;      // [heads, width]
  void *stream;
} mmadapt_projected_modality_gate_backward;

mmadapt_cuda_status mmadapt_modality_gate_forward_cuda(const mmadapt_modality_gate_forward *p);
mmadapt_cuda_status mmadapt_modality_gate_backward_cuda(const mmadapt_modality_gate_backward *p);
mmadapt_cuda_status mmadapt_projected_modality_gate_forward_cuda(
    const mmadapt_projected_modality_gate_forward *p);
mmadapt_cuda_status mmadapt_projected_modality_gate_backward_cuda(
    const mmadapt_projected_modality_gate_backward *p);

#ifdef __cplusplus
}
#endif
#endif
