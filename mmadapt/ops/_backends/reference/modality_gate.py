"""`modality_gate` in plain torch, with an explicit backward."""

import torch
from torch import Tensor

from mmadapt.ops._allocate import gradient
from mmadapt.ops._backends.reference._rows import Rows
from mmadapt.ops._checks import accumulation_dtype


def unsupported(value: Tensor, logits: Tensor, mask: Tensor) -> str | None:
    return None


def forward(value: Tensor, logits: Tensor, mask: Tensor) -> Tensor:
    rows = Rows(mask)
    gate = _gate(rows, value, logits)
    y = value.clone()
    rows.put(y, rows.take(value).to(gate.dtype) * gate.unsqueeze(-1))
    return y


def inplace(value: Tensor, logits: Tensor, mask: Tensor, save: bool) -> Tensor:
    rows, saved = Rows(mask), gradient(value, save)
    picked, gate = rows.take(value), _gate(rows, value, logits)
    if save:
        rows.put(saved, picked)
    rows.put(value, picked.to(gate.dtype) * gate.unsqueeze(-1))
    return saved


def backward(
    dy: Tensor, value: Tensor, logits: Tensor, mask: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    rows = Rows(mask)
    gate = _gate(rows, value, logits)
    grad = rows.take(dy).to(gate.dtype)
    dvalue, dlogits = gradient(value, needs[0]), gradient(logits, needs[1])
    if needs[0]:
        dvalue.copy_(dy)
        rows.put(dvalue, grad * gate.unsqueeze(-1))
    if needs[1]:
        through = (grad * rows.take(value)).sum(-1) * (1 - gate.square())
        if logits.ndim == 1:
            dlogits.copy_(through.sum(0))
        else:
            rows.put(dlogits.zero_(), through)
    return dvalue, dlogits


def _gate(rows: Rows, value: Tensor, logits: Tensor) -> Tensor:
    wide = logits.to(accumulation_dtype(value.dtype))
    return torch.tanh(rows.take(wide) if wide.ndim == 2 else wide.unsqueeze(0))
