"""LLaMA geometries on random weights, and module trees that share them."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Geometry:
    """Width d, heads, FFN width and number of layers, vocabulary."""

    dim: int
    heads: int
    ffn: int
    layers: int
    vocabulary: int

    @classmethod
    def of_width(cls, dim: int, layers: int = 1, vocabulary: int = 32) -> Geometry:
        """LLaMA's rules: heads of 128 where they fit, FFN of 8d/3 rounded up to 256."""
        head = 128 if dim % 128 == 0 else dim // 2
        unit = 256 if dim >= 256 else 8
        return cls(dim, dim // head, -(-(8 * dim // 3) // unit) * unit, layers, vocabulary)


GEOMETRIES = {
    "llama-7b": Geometry(4096, 32, 11008, 32, 32000),
    "llama-13b": Geometry(5120, 40, 13824, 40, 32000),
    "llama-7b-2-layers": Geometry(4096, 32, 11008, 2, 32000),
    "tiny": Geometry(32, 2, 88, 2, 97),
}


def build(
    geometry: Geometry, dtype: torch.dtype, device: torch.device, head: bool = False
) -> nn.Module:
    """`LlamaModel`, with `head` `LlamaForCausalLM`: random, frozen, SDPA attention."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

    config = LlamaConfig(
        vocab_size=geometry.vocabulary,
        hidden_size=geometry.dim,
        intermediate_size=geometry.ffn,
        num_hidden_layers=geometry.layers,
        num_attention_heads=geometry.heads,
        num_key_value_heads=geometry.heads,
        max_position_embeddings=4096,
        use_cache=False,
        attn_implementation="sdpa",
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # no fp32 copy of 7 billion weights
    try:
        with torch.device(device):
            model = (LlamaForCausalLM if head else LlamaModel)(config)
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False)


def sharing(model: nn.Module) -> nn.Module:
    """A deep copy of the modules that holds the same parameters and buffers."""
    memo: dict[int, Tensor] = {id(p): p for p in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def rotary(
    length: int, head: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin [1, S, head] in the half-split layout, base 10000."""
    steps = torch.arange(0, head, 2, dtype=torch.float64, device=device) / head
    angles = torch.outer(torch.arange(length, device=device).double(), 10000.0**-steps)
    angles = torch.cat((angles, angles), -1)[None]
    return angles.cos().to(dtype), angles.sin().to(dtype)
