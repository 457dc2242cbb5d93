"""`projected_modality_gate` in plain torch, with an explicit backward."""

import torch
from torch import Tensor

from mmadapt.ops._allocate import (
    gradient,
    projected_modality_gate_inplace_outputs,
    projected_modality_gate_outputs,
)
from mmadapt.ops._backends.reference._rows import Rows


def unsupported(value: Tensor, hidden: Tensor, weight: Tensor, mask: Tensor) -> str | None:
    return None


def forward(value: Tensor, hidden: Tensor, weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    rows = Rows(mask)
    y, gate = projected_modality_gate_outputs(value)
    picked = _gate(rows, hidden, weight, gate)
    y.copy_(value)
    rows.put(y, rows.take(value).to(gate.dtype) * picked.unsqueeze(-1))
    return y, gate


def inplace(
    value: Tensor, hidden: Tensor, weight: Tensor, mask: Tensor, save: bool
) -> tuple[Tensor, Tensor]:
    rows = Rows(mask)
    saved, gate = projected_modality_gate_inplace_outputs(value, save)
    picked, before = _gate(rows, hidden, weight, gate), rows.take(value)
    if save:
        rows.put(saved, before)
    rows.put(value, before.to(gate.dtype) * picked.unsqueeze(-1))
    return saved, gate


def _gate(rows: Rows, hidden: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
    """Fill `gate` and return its selected rows."""
    picked = torch.tanh(rows.take(hidden).to(gate.dtype) @ weight.to(gate.dtype).t())
    rows.put(gate.zero_(), picked)
    return picked


def backward(
    dy: Tensor,
    value: Tensor,
    hidden: Tensor,
    weight: Tensor,
    mask: Tensor,
    gate: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    rows = Rows(mask)
    dvalue, dhidden, dweight = (
        gradient(t, n) for t, n in zip((value, hidden, weight), needs, strict=True)
    )
    picked = rows.take(gate)
    grad = rows.take(dy).to(gate.dtype)
    if needs[0]:
        dvalue.copy_(dy)
        rows.put(dvalue, grad * picked.unsqueeze(-1))
    dlogits = (grad * rows.take(value)).sum(-1) * (1 - picked.square())
    if needs[1]:
        rows.put(dhidden.zero_(), dlogits @ weight.to(gate.dtype))
    if needs[2]:
        dweight.copy_(dlogits.t() @ rows.take(hidden).to(gate.dtype))
    return dvalue, dhidden, dweight
