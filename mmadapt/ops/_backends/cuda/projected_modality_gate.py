"""`projected_modality_gate` in CUDA C++ (csrc/cuda/projected_modality_gate_*.cu)."""

import torch
from torch import Tensor

from mmadapt.ops._allocate import (
    gradient,
    projected_modality_gate_inplace_outputs,
    projected_modality_gate_outputs,
)
from mmadapt.ops._backends.cuda._launch import DTYPES, address, extension, on_device, stream
from mmadapt.ops._backends.cuda.modality_gate import unsupported_value

_C = extension()


def unsupported(value: Tensor, hidden: Tensor, weight: Tensor, mask: Tensor) -> str | None:
    if (reason := unsupported_value(value)) is not None:
        return reason
    return f"hidden has {hidden.shape[1]} columns, too many" if hidden.shape[1] >= 2**30 else None


def forward(value: Tensor, hidden: Tensor, weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    y, gate = projected_modality_gate_outputs(value)
    _forward(value, hidden, weight, mask, y, gate, None)
    return y, gate


def inplace(
    value: Tensor, hidden: Tensor, weight: Tensor, mask: Tensor, save: bool
) -> tuple[Tensor, Tensor]:
    saved, gate = projected_modality_gate_inplace_outputs(value, save)
    _forward(value, hidden, weight, mask, value, gate, saved)
    return saved, gate


def _forward(
    value: Tensor,
    hidden: Tensor,
    weight: Tensor,
    mask: Tensor,
    y: Tensor,
    gate: Tensor,
    saved: Tensor | None,
) -> None:
    if gate.numel() == 0:
        return
    rows = _list(mask)
    with on_device(value):
        _C.cuda.projected_modality_gate_forward(
            *value.shape, hidden.shape[1], DTYPES[value.dtype], DTYPES[weight.dtype],
            *map(address, (value, hidden, weight, mask, rows, y, gate, saved)), stream(value),
        )  # fmt: skip


def backward(
    dy: Tensor,
    value: Tensor,
    hidden: Tensor,
    weight: Tensor,
    mask: Tensor,
    gate: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    dvalue, dhidden, dweight = (
        gradient(t, n) for t, n in zip((value, hidden, weight), needs, strict=True)
    )
    tokens, heads, _ = dy.shape
    width = hidden.shape[1]
    if dy.numel() == 0:
        dhidden.zero_()
        dweight.zero_()
        return dvalue, dhidden, dweight
    runs = _runs(tokens, heads, width, dy.element_size())
    wide = {"dtype": torch.float32}
    dlogits = dy.new_empty((tokens, heads) if dweight.numel() else 0, **wide)
    parts = dy.new_empty((runs, heads, width) if dweight.numel() else 0, **wide)
    rows = _list(mask)
    with on_device(dy):
        _C.cuda.projected_modality_gate_backward(
            *dy.shape, width, runs, DTYPES[dy.dtype], DTYPES[weight.dtype],
            *map(address, (dy, value, hidden, weight, mask, gate, rows, dlogits, parts)),
            *map(address, (dvalue, dhidden, dweight)), stream(dy),
        )  # fmt: skip
    return dvalue, dhidden, dweight


def _list(mask: Tensor) -> Tensor:
    """Memory for the list of masked rows and its length."""
    return mask.new_empty(mask.shape[0] + 1, dtype=torch.int32)


def _runs(tokens: int, heads: int, width: int, element_size: int) -> int:
    """Parts of the sum over tokens: about 128 blocks, one for each SM of an H100.

    A function of the shape alone, so that the order of the sum is too.
    """
    blocks = -(-heads // 16) * -(-width // (512 if element_size == 2 else 128))
    return min(max(128 // max(blocks, 1), 1), 64, -(-tokens // 8))
