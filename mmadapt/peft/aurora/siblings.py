"""Run q, k and v of one input as one operator, although a model calls them one by one."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmadapt.peft.aurora.branch import fused_group

if TYPE_CHECKING:
    from mmadapt.peft.aurora.linear import AuroraLinear


@dataclass
class _Kept:
    """An output that was computed before it is asked for."""

    x: Tensor
    stamp: tuple
    y: Tensor


class Siblings:
    """Layers of one attention that get the same input, and have weights of one shape.

    The first that is called computes for all and keeps what the others will be asked for. What is
    kept is given out once, for the same input in the same state, and to nobody else.
    """

    def __init__(self) -> None:
        self.members: list[AuroraLinear] = []
        self._kept: dict[int, _Kept] = {}

    def run(self, layer: "AuroraLinear", x: Tensor, adapter: str) -> Tensor:
        """Output of `layer`, one of the members, for ``x [..., d]``."""
        kept = self._kept.pop(id(layer), None)
        if kept is not None and kept.x is x and kept.stamp == _stamp(layer, x, adapter):
            return kept.y
        members = self.joint(layer, x, adapter)
        y, *rest = fused_group(members, x, adapter)
        self._kept = {
            id(member): _Kept(x, _stamp(member, x, adapter), other)
            for member, other in zip(members[1:], rest, strict=True)
        }
        return y

    def joint(self, layer: "AuroraLinear", x: Tensor, adapter: str) -> list["AuroraLinear"]:
        """`layer`, and the siblings that would run the same adapter in the same way."""
        if torch.compiler.is_compiling():
            return [layer]
        others = (member for member in self.members if member is not layer)
        return [layer, *(other for other in others if _alike(other, layer, adapter, x))]

    def __getstate__(self) -> dict[str, Any]:
        return {"members": self.members, "_kept": {}}


def _alike(member: "AuroraLinear", layer: "AuroraLinear", adapter: str, x: Tensor) -> bool:
    if member.current != [adapter] or member.merged or member.training != layer.training:
        return False
    return member.device == layer.device and member.can_fuse(x, adapter)


def _stamp(layer: "AuroraLinear", x: Tensor, adapter: str) -> tuple:
    """Changes with everything that the output depends on."""
    factors = layer.shared.factors[adapter]
    state = [x, layer.base_layer.weight, layer.mode_vectors(adapter), factors.core]
    state += [factors.factor_in(layer.factor_widths[0]), factors.factor_out(layer.factor_widths[1])]
    versions = [0 if t.is_inference() else t._version for t in state]
    return (torch.is_grad_enabled(), layer.training, *map(id, state), *versions)
