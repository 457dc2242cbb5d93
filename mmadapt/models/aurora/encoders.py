"""BLIP's towers as the objectives and scorers call them: images or videos, texts, pairs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from mmadapt.models.aurora.cross_states import CrossStates
from mmadapt.models.aurora.frame_attention import frame_aware


class Visual(NamedTuple):
    """`hidden` [B, T*N, d]: all tokens of all frames; `feature` [B, D] and `frames` [B, T, D]."""

    hidden: Tensor
    feature: Tensor
    frames: Tensor


class Text(NamedTuple):
    """`state` [B, d]: unimodal CLS; `feature` [B, D]: projected, unit length."""

    state: Tensor
    feature: Tensor


def blip_of(model: nn.Module) -> Any:
    """The Hugging Face model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def visual_hidden(blip: Any, pixels: Tensor) -> Tensor:
    """Vision tokens `[B, T, N, d]` of images `[B, 3, H, W]` (T = 1) or videos `[B, T, 3, H, W]`.

    Frames are encoded one by one. Another image size than the model's interpolates positions.

    Raises:
        ValueError: another number of dimensions.
    """
    if pixels.ndim not in (4, 5):
        raise ValueError(
            f"pixel_values: expected [B, 3, H, W] or [B, T, 3, H, W], got {list(pixels.shape)}"
        )
    frames = pixels.shape[1] if pixels.ndim == 5 else 1
    flat = pixels.flatten(0, 1) if pixels.ndim == 5 else pixels
    other_size = flat.shape[-1] != blip.config.vision_config.image_size
    hidden = blip.vision_model(flat, interpolate_pos_encoding=other_size).last_hidden_state
    return hidden.unflatten(0, (-1, frames))


def encode_visual(blip: Any, pixels: Tensor) -> Visual:
    """Tokens and contrastive features; a video's feature is that of its mean CLS token."""
    hidden = visual_hidden(blip, pixels)
    cls = hidden[:, :, 0]
    return Visual(
        hidden=hidden.flatten(1, 2),
        feature=normalize(blip.vision_proj(cls.mean(1)), dim=-1),
        frames=normalize(blip.vision_proj(cls), dim=-1),
    )


def encode_text(blip: Any, ids: Tensor, mask: Tensor) -> Text:
    """Unimodal encoding of token ids `[B, L]` with mask `[B, L]`: no cross-attention."""
    state = blip.text_encoder(ids, attention_mask=mask).last_hidden_state[:, 0]
    return Text(state, normalize(blip.text_proj(state), dim=-1))


def encode_pairs(
    blip: Any,
    ids: Tensor,
    mask: Tensor,
    *,
    hidden: Tensor | None = None,
    states: CrossStates | None = None,
    record: Any = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Fused CLS `[B, d]` of texts and images, row by row; all visual tokens are attended to.

    The images come as `hidden` [B, S, d], or as `states` that were computed before. `record` is
    a cache from `CrossStates.recorder()` that takes the states down; `scale` [B, S] is for
    `frame_aware`.
    """
    if (hidden is None) == (states is None):
        raise ValueError("give either hidden or states")
    if states is not None:
        hidden, record = states.placeholder(), states.cache()
    with frame_aware(blip.text_encoder, scale):
        output = blip.text_encoder(
            ids, attention_mask=mask, encoder_hidden_states=hidden, past_key_values=record
        )
    return output.last_hidden_state[:, 0]


def with_first_token(ids: Tensor, token: int) -> Tensor:
    """The ids with another first token: [ENC] marks texts that are read beside an image."""
    ids = ids.clone()
    ids[:, 0] = token
    return ids


def branch_dropout(text_model: nn.Module) -> bool:
    """Whether an adapter drops out inside the key or value projections of cross-attention now.

    Then two passes over the same image see different keys, and states must not be shared.
    """
    for layer in text_model.encoder.layer:
        attention = layer.crossattention.self
        for module in (*attention.key.modules(), *attention.value.modules()):
            rate = module.p if isinstance(module, nn.Dropout) else 0.0
            rate = max(rate, getattr(module, "branch_dropout", 0.0))
            if module.training and rate > 0:
                return True
    return False


@torch.no_grad()
def clamp_temperature(temperature: Tensor, low: float = 0.001, high: float = 0.5) -> None:
    temperature.clamp_(low, high)
