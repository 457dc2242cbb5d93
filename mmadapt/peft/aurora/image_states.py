"""Project the states that all layers of a text stack attend to onto the shared factor once.

Every cross-attention layer maps the same states E to keys and values. With a shared factor the
first step of all those updates, ``z = E factor_in^T``, is the same. It is computed in front of the
layers, where activation checkpointing does not repeat it, and rides on the tensor that they get.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmadapt.peft.aurora.layer import Shared

_STATES = "encoder_hidden_states"
_ATTRIBUTE = "_mmadapt_aurora_projections"


class Projections:
    """``z [..., R]`` by adapter. In evaluation they are computed when they are asked for."""

    def __init__(self, states: Tensor) -> None:
        self.states = states
        self.values: dict[str, tuple[Tensor, Tensor]] = {}

    def get(self, adapter: str, factor: Tensor) -> Tensor:
        known = self.values.get(adapter)
        if known is None or known[0] is not factor:
            value = F.linear(self.states, factor.to(self.states.device, self.states.dtype))
            known = self.values[adapter] = (factor, value)
        return known[1]


def projection_of(
    x: Tensor, adapter: str, factors: nn.ModuleDict, *, training: bool
) -> Tensor | None:
    """``x factor_in^T`` of the adapter if it rides on `x`, else None."""
    if torch.compiler.is_compiling():
        return None
    if training and not torch.is_grad_enabled():
        # Maybe a layer under reentrant checkpointing, which will be run again on other tensor
        # objects, and must drop out the same entries then.
        return None
    projections = getattr(x, _ATTRIBUTE, None)
    if projections is None:
        return None
    factor = factors[adapter].factor_in(x.shape[-1])
    known = adapter in projections.values and projections.values[adapter][0] is factor
    return None if not known and torch.is_grad_enabled() else projections.get(adapter, factor)


class ProjectStates:
    """Forward pre-hook of a text stack (the module that holds its layers).

    Args:
        shared: what the wrappers of the tuner share.
    """

    def __init__(self, shared: Shared) -> None:
        self.shared = shared

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        states = kwargs.get(_STATES)
        if states is None or torch.compiler.is_compiling() or not states.is_floating_point():
            return None
        if _has_cached_states(kwargs.get("past_key_values")):
            return None
        layers = shares_projection(module)
        adapters = list(dict.fromkeys(name for layer in layers for name in layer.current))
        if not adapters:
            return None
        # An alias, because the projection's graph holds `states`: no tensor holds itself.
        alias = states.view_as(states)
        projections = Projections(states)
        if torch.is_grad_enabled():
            for adapter in adapters:
                factors = self.shared.factors[adapter]
                projections.get(adapter, factors.factor_in(states.shape[-1]))
        setattr(alias, _ATTRIBUTE, projections)
        return args, kwargs | {_STATES: alias}


def shares_projection(stack: nn.Module) -> list[Any]:
    """The adapted keys and values of a text stack's cross-attention that share a projection now."""
    layers = [
        layer
        for child in stack.modules()
        if hasattr(child, "crossattention")
        for layer in (child.crossattention.self.key, child.crossattention.self.value)
        if hasattr(layer, "mode_vectors") and not layer.merged and layer.current
    ]
    # Sharded layers are whole only while they run, and FSDP's hooks hand on other tensors.
    plain = (torch.Tensor, nn.Parameter)
    sharded = any(type(p) not in plain for layer in layers for p in layer.parameters())
    return [] if sharded or len(layers) < 3 else layers


def _has_cached_states(cache: Any) -> bool:
    """Whether cross-attention will read its keys and values from a cache."""
    updated = getattr(cache, "is_updated", None)
    return bool(updated) and all(updated.values())
