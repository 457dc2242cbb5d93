"""Keys and values of a cross-attended sequence, computed once and used for many queries.

A cross-attention layer's keys and values depend on the image alone. Hugging Face's BLIP text
model keeps them in the cross-attention half of an `EncoderDecoderCache`, and reads them from
there when they are present. So one pass fills such a cache, and further passes over the images,
in another order or beside other texts, take rows of it. Gradients flow through the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class CrossStates:
    """Keys and values `[N, heads, S, head_dim]` of every cross-attention layer."""

    def __init__(self, layers: list[tuple[Tensor, Tensor]]) -> None:
        self.layers = layers

    @staticmethod
    def recorder() -> Any:
        """An empty cache; pass it as `past_key_values`, then read it with `recorded`."""
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache

        return EncoderDecoderCache(DynamicCache(), DynamicCache())

    @classmethod
    def recorded(cls, cache: Any) -> CrossStates:
        return cls([(layer.keys, layer.values) for layer in cache.cross_attention_cache.layers])

    @classmethod
    def of(cls, text_model: nn.Module, hidden: Tensor) -> CrossStates:
        """States of `hidden` [N, S, d], through the live modules with whatever adapts them.

        Runs `text_model` over one token per row, which costs little beside the projections.
        """
        cache = cls.recorder()
        token = torch.zeros(len(hidden), 1, dtype=torch.int64, device=hidden.device)
        text_model(token, encoder_hidden_states=hidden, past_key_values=cache)
        return cls.recorded(cache)

    def cache(self) -> Any:
        """A fresh cache that holds these states for the cross-attention of one pass."""
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache

        cross = DynamicCache()
        for index, (keys, values) in enumerate(self.layers):
            # updating with nothing makes the layer; setting its tensors then copies nothing
            cross.update(keys[..., :0, :], values[..., :0, :], index)
            cross.layers[index].keys, cross.layers[index].values = keys, values
        return EncoderDecoderCache(DynamicCache(), cross)

    def take(self, rows: Tensor) -> CrossStates:
        """The states of these rows; an index may occur several times."""
        return self._each(lambda tensor: tensor.index_select(0, rows))

    def expand(self, count: int) -> CrossStates:
        """One row as `count` rows, without a copy."""
        return self._each(lambda tensor: tensor.expand(count, *tensor.shape[1:]))

    def placeholder(self) -> Tensor:
        """What to pass as `encoder_hidden_states` beside `cache()`: zeros `[N, S, d]` without
        memory. They are looked at for their shape; the tokens themselves are not read."""
        keys = self.layers[0][0]
        rows, heads, length, head_dim = keys.shape
        return keys.new_zeros(1, 1, 1).expand(rows, length, heads * head_dim)

    def _each(self, change: Callable[[Tensor], Tensor]) -> CrossStates:
        return CrossStates([(change(keys), change(values)) for keys, values in self.layers])
