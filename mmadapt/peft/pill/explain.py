"""Report how the PILL wrappers of a model run: norm fused or not, on which backend, and why."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmadapt import ops
from mmadapt.nn import SwiGLUAdapter
from mmadapt.peft.pill.adapters import stacked
from mmadapt.peft.pill.layer import PillLayer
from mmadapt.peft.pill.projector import PillProjector


@dataclass(frozen=True)
class WrapperReport:
    """How one wrapped `self_attn` or `mlp` runs with the active adapter.

    Attributes:
        path: of the wrapper in the model.
        fused: whether the norm in front of it is part of the adapter's operator.
        reason: why not; None if it is.
        backend: that serves the operator; None without a SwiGLU adapter.
    """

    path: str
    fused: bool
    reason: str | None
    backend: str | None

    def __str__(self) -> str:
        norm = "norm fused" if self.fused else f"norm not fused: {self.reason}"
        return f"{self.path}: {self.backend or 'no operator'}, {norm}"


def explain(model: nn.Module, tokens: int = 1024) -> list[WrapperReport]:
    """One report for each adapted `self_attn` and `mlp`, in order; print them to read them.

    What depends on the input is answered for activations in the dtype of the layer, in the present
    autocast state; every call decides anew.

    Args:
        model: a `PeftModel`, or a model with an injected PILL adapter.
        tokens: how many tokens the call would have, which the choice of a backend may depend on.
    """
    return [
        _report(name, module, tokens)
        for name, module in model.named_modules()
        if isinstance(module, PillLayer) and not isinstance(module, PillProjector)
    ]


@torch.no_grad()
def _report(path: str, wrapper: PillLayer, tokens: int) -> WrapperReport:
    adapters, deferred = wrapper.first_adapters(), wrapper.deferred_norm
    parameter = next(p for p in wrapper.base_layer.parameters() if p.is_floating_point())
    if deferred is not None:
        parameter = deferred.norm.weight
    x = parameter.new_empty(tokens, wrapper.dim)
    if deferred is None:
        reason = wrapper.norm_refusal() or wrapper.norm_reason
    else:
        reason = deferred.refusal() or deferred.refusal_of(x)
    norm = None
    if reason is None:
        norm = deferred.norm.weight, deferred.eps
    backend = None
    if adapters and isinstance(adapters[0], SwiGLUAdapter):
        backend = _backend(adapters, x, norm)
    return WrapperReport(path, reason is None, reason, backend)


def _backend(adapters: list[SwiGLUAdapter], x: Tensor, norm: tuple[Tensor, float] | None) -> str:
    expert = x.new_zeros(x.shape[:-1], dtype=torch.int32) if len(adapters) > 1 else None
    residual = "input" if norm is None else "norm"
    weights = stacked(adapters, x.dtype)
    return ops.explain(
        "swiglu_adapter", x, *weights, expert=expert, norm=norm, residual=residual
    ).backend
