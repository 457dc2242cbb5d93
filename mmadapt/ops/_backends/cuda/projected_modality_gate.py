"""`projected_modality_gate` in CUDA C++ (csrc/cuda/projected_modality_gate_*.cu)."""

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
    with on_device(value):
        _C.cuda.projected_modality_gate_forward(
            *value.shape, hidden.shape[1], DTYPES[value.dtype], DTYPES[weight.dtype],
            *map(address, (value, hidden, weight, mask, y, gate, saved)), stream(value),
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
    # As the kernels leave it: transposed, the rows of a group side by side.
    dlogits = dy.new_empty((heads, -(-tokens // 8) * 8) if dweight.numel() else 0)
    with on_device(dy):
        _C.cuda.projected_modality_gate_backward(
            *dy.shape, width, DTYPES[dy.dtype], DTYPES[weight.dtype],
            *map(address, (dy, value, hidden, weight, mask, gate, dlogits)),
            *map(address, (dvalue, dhidden, dweight)), stream(dy),
        )  # fmt: skip
    return dvalue, dhidden, dweight
