"""Run the parts of a PILL adapter on activations of any dtype, routed where there are several."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmadapt import ops
from mmadapt.nn import LinearAdapter, ModalityGate, SwiGLUAdapter
from mmadapt.peft._dtypes import usable

Adapter = SwiGLUAdapter | LinearAdapter


def new_adapter(kind: str, dim: int, rank: int, *, identity: bool = True) -> Adapter:
    """A fresh adapter; the identity function unless `identity` is False."""
    adapter = SwiGLUAdapter(dim, rank) if kind == "swiglu" else LinearAdapter(dim, rank)
    if not identity:
        nn.init.normal_(adapter.up, std=0.02)
    return adapter


def apply_adapters(
    adapters: Sequence[Adapter],
    x: Tensor,
    expert: Tensor | None,
    norm: tuple[Tensor, float] | None = None,
) -> Tensor:
    """`n + A_e(n)` with `e = expert[t]` for each token; `expert=None` means the first adapter.

    All adapters are part of the autograd graph, also those that no token is routed to: they get
    zero gradients, not None, so that ranks with different batches reduce the same parameters.

    Args:
        adapters: one or several adapters of the same kind and size.
        x: [..., dim].
        expert: integer tensor of shape `x.shape[:-1]`.
        norm: weight and epsilon of `n = rms_norm(x)`, for SwiGLU adapters; else `n = x`.
    """
    if expert is None and len(adapters) > 1:
        expert = x.new_zeros(x.shape[:-1], dtype=torch.int32)
    if isinstance(adapters[0], LinearAdapter):
        return _apply_linear(adapters, x, expert)
    gate, down, up = stacked(adapters, x.dtype)
    residual = "input" if norm is None else "norm"
    return ops.swiglu_adapter(x, gate, down, up, expert=expert, norm=norm, residual=residual)


def apply_gate(
    gate: ModalityGate, values: Tensor, mask: Tensor, hidden: Tensor, *, inplace: bool = False
) -> Tensor:
    """Scale `values` [..., H * h] where `mask` [...] is true, by a gate on `hidden` [..., dim].

    With `inplace`, `values` may be overwritten (`mmadapt.ops.modality_gate` says when).
    """
    weight = usable(gate.gate, values.dtype)
    if gate.kind == "static":
        return ops.modality_gate(values, weight, mask, inplace=inplace)
    hidden = hidden.to(values.dtype)
    return ops.projected_modality_gate(values, hidden, weight, mask, inplace=inplace)


def _apply_linear(adapters: Sequence[Adapter], x: Tensor, expert: Tensor | None) -> Tensor:
    down = torch.cat([a.down.to(x.dtype) for a in adapters], dim=0)
    up = torch.cat([a.up.to(x.dtype) for a in adapters], dim=1)
    hidden = F.linear(x, down)
    if expert is not None:
        here = expert.unsqueeze(-1) == torch.arange(len(adapters), device=x.device)
        hidden = (hidden.unflatten(-1, (len(adapters), -1)) * here.unsqueeze(-1)).flatten(-2)
    return x + F.linear(hidden, up).to(x.dtype)


def stacked(adapters: Sequence[SwiGLUAdapter], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """gate, down, up with one leading entry per adapter, as the ops take them beside `dtype`."""
    return tuple(_stack(adapters, name, dtype) for name in ("gate", "down", "up"))


def _stack(adapters: Sequence[Adapter], name: str, dtype: torch.dtype) -> Tensor:
    weights = torch.stack([getattr(adapter, name) for adapter in adapters])
    return usable(weights, dtype)
