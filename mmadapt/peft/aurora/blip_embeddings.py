"""Let BLIP's text models run under activation checkpointing with frozen embeddings.

transformers then makes the output of the word embeddings a leaf that requires a gradient
(`enable_input_require_grads`), to which BLIP adds its positions in place: an error.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def text_embeddings(model: nn.Module) -> Iterator[nn.Module]:
    """BLIP's embeddings of text, and others of the same shape."""
    for module in model.modules():
        if hasattr(module, "word_embeddings") and hasattr(module, "position_embeddings"):
            yield module


class CopyLeaf:
    """Forward pre-hook of text embeddings: hands them a copy of word embeddings that are a leaf."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        ids = kwargs.get("input_ids")
        if args or ids is None or kwargs.get("inputs_embeds") is not None:
            return None
        if not torch.is_grad_enabled() or not module.word_embeddings._forward_hooks:
            return None
        embeds = module.word_embeddings(ids)
        if embeds.is_leaf and embeds.requires_grad:
            embeds = embeds.clone()
        return args, kwargs | {"inputs_embeds": embeds}
