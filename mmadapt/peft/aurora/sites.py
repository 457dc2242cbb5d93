"""Find what Aurora adapts in a model: by the structure of its modules, not by name suffix."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from mmadapt.peft.structure import find_language_model

Kind = Literal["linear", "fused", "up", "down", "query_transform"]

_HEADS = ("query", "key", "value")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Site:
    """A module that Aurora can wrap.

    Attributes:
        component: which of `AuroraConfig.components` it belongs to.
        kind: `"linear"`, one weight; `"fused"`, `chunks` weights one below the other; `"up"` and
            `"down"`, an FFN of `chunks` times the width; `"query_transform"`, the end of a text
            layer.
        chunks: how many square weights it stands for, and how many mode vectors it has.
        fan: how many mode vectors were drawn as one matrix, which their initial size depends on.
        dropout_at: where the branch drops out, as `mmadapt.ops.cp_linear` takes it.
        group: sites of one group get the same input: they run as one operator.
    """

    component: str
    kind: Kind = "linear"
    chunks: int = 1
    fan: int = 1
    dropout_at: str = "before"
    group: str | None = None


def find_sites(model: nn.Module) -> dict[str, Site]:
    """Every module that can be adapted without being named, by path, in the order of the model."""
    sites: dict[str, Site] = {}
    for path, module in model.named_modules():
        sites |= _vision_layer(path, module) | _text_layer(path, module)
    if not any(_is_text(site) for site in sites.values()):
        prefix, language_model = find_language_model(model)
        for path, module in language_model.named_modules(prefix=prefix):
            sites |= _decoder_attention(path, module)
    return sites


def default_components(sites: dict[str, Site]) -> list[str]:
    """What is adapted unless told otherwise: all of BLIP, of other models the language model."""
    found = list(dict.fromkeys(site.component for site in sites.values()))
    return ["language_model"] if "language_model" in found else found


def _is_text(site: Site) -> bool:
    return site.component in ("text_self", "cross", "decoder")


def text_stacks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that hold a list of text layers with cross-attention, by path."""
    for path, module in model.named_modules():
        for child in module.children():
            layers = isinstance(child, nn.ModuleList) and len(child)
            if layers and all(_is_text_layer(x) and hasattr(x, "crossattention") for x in child):
                yield path, module


def linear_of(module: nn.Module | None) -> nn.Linear | None:
    """The linear layer itself, or below a wrapper; None for anything else."""
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    return module if isinstance(module, nn.Linear) else None


def layer_index(path: str) -> int | None:
    """Index of the layer that a module belongs to: the last number of its path but the end."""
    numbers = re.findall(r"\.(\d+)\.", f".{path}.")
    return int(numbers[-1]) if numbers else None


def _linears(module: nn.Module | None, *names: str) -> list[nn.Linear] | None:
    if module is None:
        return None
    found = [linear_of(getattr(module, name, None)) for name in names]
    return None if None in found else found


def _vision_layer(path: str, module: nn.Module) -> dict[str, Site]:
    """A layer of BLIP's vision transformer: fused q, k, v, their projection and an FFN."""
    attention = _linears(getattr(module, "self_attn", None), "qkv", "projection")
    if attention is None or attention[0].out_features != 3 * attention[0].in_features:
        return {}
    sites = {
        _join(path, "self_attn.qkv"): Site("vit_qkv", "fused", 3, 4, "after"),
        _join(path, "self_attn.projection"): Site("vit_proj", fan=4, dropout_at="after"),
    }
    ffn = _linears(getattr(module, "mlp", None), "fc1", "fc2")
    if ffn is not None:
        width, hidden = ffn[0].in_features, ffn[0].out_features
        chunks = hidden // width if hidden % width == 0 else 0
        sites[_join(path, "mlp.fc1")] = Site("vit_mlp", "up", chunks, 2 * chunks, "after")
        sites[_join(path, "mlp.fc2")] = Site("vit_mlp", "down", chunks, 2 * chunks, "after")
    return sites


def _is_text_layer(module: nn.Module) -> bool:
    attention = getattr(module, "attention", None)
    heads = _linears(getattr(attention, "self", None), *_HEADS)
    return heads is not None and hasattr(module, "intermediate") and hasattr(module, "output")


def _text_layer(path: str, module: nn.Module) -> dict[str, Site]:
    """A layer of a BERT-like text model; its cross-attention may have an encoder of any width."""
    if not _is_text_layer(module):
        return {}
    own, cross = ("text_self", "cross")
    if "text_decoder" in path.split("."):
        own = cross = "decoder"
    where = _join(path, "attention.self")
    sites = {f"{where}.{head}": Site(own, group=where) for head in _HEADS}
    heads = _linears(getattr(getattr(module, "crossattention", None), "self", None), *_HEADS)
    if heads is not None:
        where = _join(path, "crossattention.self")
        sites[f"{where}.query"] = Site(cross)
        sites |= {f"{where}.{head}": Site(cross, group=where) for head in _HEADS[1:]}
        sites[_join(path, "output")] = Site(cross, "query_transform")
    return sites


def _decoder_attention(path: str, module: nn.Module) -> dict[str, Site]:
    """Attention of a language model, with q, k and v of any width."""
    if _linears(module, *_PROJECTIONS) is None:
        return {}
    sites = {f"{path}.{name}": Site("language_model", group=path) for name in _PROJECTIONS}
    for name in ("o_proj", "out_proj", "dense"):
        if linear_of(getattr(module, name, None)) is not None:
            sites[f"{path}.{name}"] = Site("language_model")
    return sites


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
