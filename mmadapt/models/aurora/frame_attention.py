"""Frame-aware cross-attention: frames near the text get larger keys (Aurora's video retrieval).

The released code multiplies the keys of frame t's patches by sigma_t, after the adapter's share,
in every layer. Multiplying those tokens' logits is the same number, and leaves the keys
independent of the text: they can be computed once per video and shared by all texts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def frame_weights(text: Tensor, frames: Tensor, *, temperature: float = 4.0) -> Tensor:
    """sigma `[B, T]` of text features `[B, D]` and frame features `[B, T, D]`, of unit length.

    softmax over the frames of their similarities / temperature, times T: weights average 1.
    """
    similarity = torch.einsum("bd,btd->bt", text.float(), frames.float())
    return (similarity / temperature).softmax(1) * frames.shape[1]


def token_scale(weights: Tensor, tokens_per_frame: int) -> Tensor:
    """`[B, T * tokens_per_frame]`: sigma_t on the patches of frame t, 1 on its CLS."""
    scale = weights[:, :, None].repeat(1, 1, tokens_per_frame)
    scale[:, :, 0] = 1
    return scale.flatten(1)


def scaled_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: Tensor,
    *,
    mask: Tensor | None = None,
    dropout: nn.Module | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention whose logits on key s are multiplied by `scale[b, s]`; output and probabilities.

    `query` [B, H, L, h]; `keys`, `values` [B, H, S, h]; `scale` [B, S]; `mask` is added to the
    scaled logits; `dropout` acts on the probabilities that meet the values.
    """
    logits = query @ keys.transpose(-1, -2) / math.sqrt(query.shape[-1])
    logits = logits * scale[:, None, None, :].to(logits.dtype)
    if mask is not None:
        logits = logits + mask
    weights = logits.softmax(-1)
    return (weights if dropout is None else dropout(weights)) @ values, weights


@contextmanager
def frame_aware(text_model: nn.Module, scale: Tensor | None) -> Iterator[None]:
    """Every cross-attention of `text_model` scales its logits by `scale` [B, S] in this block.

    None changes nothing. The modules' own projections run, adapted or not, and their caches are
    honoured, so image keys and values that were computed before are used as they are.
    """
    if scale is None:
        yield
        return
    modules = [layer.crossattention.self for layer in text_model.encoder.layer]
    modules = [getattr(module, "base_layer", module) for module in modules]
    for module in modules:
        module._frame_scale = scale
        module.forward = MethodType(_forward, module)
    try:
        yield
    finally:
        for module in modules:
            del module._frame_scale, module.forward


def _forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    mask = encoder_attention_mask if encoder_attention_mask is not None else attention_mask
    query = _heads(self, self.query(hidden_states))
    cache = None if past_key_values is None else past_key_values.cross_attention_cache
    if cache is not None and past_key_values.is_updated.get(self.layer_idx):
        keys, values = cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
    else:
        keys = _heads(self, self.key(encoder_hidden_states))
        values = _heads(self, self.value(encoder_hidden_states))
        if cache is not None:
            keys, values = cache.update(keys, values, self.layer_idx)
            past_key_values.is_updated[self.layer_idx] = True
    context, weights = scaled_attention(
        query, keys, values, self._frame_scale, mask=mask, dropout=self.dropout
    )
    return context.transpose(1, 2).flatten(2), weights


def _heads(attention: Any, projected: Tensor) -> Tensor:
    split = projected.unflatten(-1, (attention.num_attention_heads, attention.attention_head_size))
    return split.transpose(1, 2)
