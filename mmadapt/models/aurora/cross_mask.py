"""Masks of cross-attended sequences, which Hugging Face's BLIP text model builds and then drops.

`BlipTextLayer` hands the encoder's mask to the cross-attention as `attention_mask`, and
`BlipTextSelfAttention` reads `encoder_attention_mask` there (transformers 5.17 to 5.23), so the
padding of a question is attended to by the answer decoder. BLIP masks it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def cross_masks(text_model: nn.Module) -> Iterator[None]:
    """The cross-attentions of `text_model` heed `encoder_attention_mask` in this block."""
    hooks = [
        layer.crossattention.self.register_forward_pre_hook(_hand_over, with_kwargs=True)
        for layer in text_model.encoder.layer
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hand_over(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    if kwargs.get("encoder_attention_mask") is None:
        kwargs = kwargs | {"encoder_attention_mask": kwargs.get("attention_mask")}
    return args, kwargs
