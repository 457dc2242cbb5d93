"""Report how the Aurora wrappers of a model run: as one operator or not, with whom, and why."""

from dataclasses import dataclass

import torch
from torch import nn

from mmadapt import ops
from mmadapt.peft.aurora.branch import operation
from mmadapt.peft.aurora.image_states import shares_projection
from mmadapt.peft.aurora.linear import AuroraLinear
from mmadapt.peft.aurora.sites import text_stacks


@dataclass(frozen=True)
class AuroraReport:
    """How one adapted linear layer runs with the active adapter.

    Attributes:
        path: of the layer in the model.
        fused: whether base and update are one operator.
        reason: why not; None if they are.
        backend: that serves the operator; None without one.
        together: paths of the layers whose outputs the same operator computes.
    """

    path: str
    fused: bool
    reason: str | None
    backend: str | None
    together: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.fused:
            return f"{self.path}: not one operator: {self.reason}"
        names = ", ".join(path.rpartition(".")[2] for path in self.together)
        return f"{self.path}: {self.backend}, one operator" + (f" with {names}" if names else "")


def explain_aurora(model: nn.Module, tokens: int = 1024) -> list[AuroraReport]:
    """One report for each adapted linear layer, in order; print them to read them.

    What depends on the input is answered for activations in the dtype of the layer, in the present
    autocast state; every call decides anew.

    Args:
        model: a `PeftModel` with an Aurora adapter, or the model below it.
        tokens: how many tokens the call would have, which the choice of a backend may depend on.
    """
    stacks = [module for _, module in text_stacks(model)]
    sharing = {id(layer) for stack in stacks for layer in shares_projection(stack)}
    return [
        _report(name, module, tokens, id(module) in sharing)
        for name, module in model.named_modules()
        if isinstance(module, AuroraLinear)
    ]


@torch.no_grad()
def _report(path: str, layer: AuroraLinear, tokens: int, sharing: bool) -> AuroraReport:
    names = layer.current
    reason = None
    if layer.merged:
        reason = "it is merged"
    elif not names:
        reason = "no adapter is active here"
    elif sharing:
        reason = "all layers share one projection of the states they attend to"
    else:
        reason = layer.refusal(names[0])
    if reason is not None:
        return AuroraReport(path, False, reason, None)
    x = layer.weight.new_empty(tokens, layer.in_features)
    members = layer.siblings.joint(layer, x, names[0]) if layer.siblings else [layer]
    args, settings = operation(members, x, names[0])
    choice = ops.explain("cp_linear_group", *args, **settings)
    together = tuple(other.path for other in members[1:])
    return AuroraReport(path, True, None, choice.backend, together)
