"""`modality_gate` in CUDA C++ (csrc/cuda/modality_gate.cu)."""

import torch
from torch import Tensor

from mmadapt.ops._allocate import gradient
from mmadapt.ops._backends.cuda._launch import (
    DTYPES,
    address,
    extension,
    on_device,
    stream,
    unsupported_device,
)

_C = extension()

MAX_HEADS = 1024
"""The gates of eight rows lie in shared memory."""

PARTS = 512
"""At most so many parts are added up for logits [H]; each holds eight tokens or more."""


def unsupported(value: Tensor, logits: Tensor, mask: Tensor) -> str | None:
    return unsupported_value(value)


def unsupported_value(value: Tensor) -> str | None:
    """Why the kernels of both gates cannot run, or None."""
    if (reason := unsupported_device("value", value)) is not None:
        return reason
    tokens, heads, size = value.shape
    if heads > MAX_HEADS:
        return f"value has {heads} heads, at most {MAX_HEADS}"
    if tokens >= 2**31 or heads * size >= 2**31:
        return f"value has shape {list(value.shape)}, a side of 2^31 or more"
    return None


def forward(value: Tensor, logits: Tensor, mask: Tensor) -> Tensor:
    y = value.new_empty(value.shape)
    _forward(value, logits, mask, y, None)
    return y


def inplace(value: Tensor, logits: Tensor, mask: Tensor, save: bool) -> Tensor:
    saved = gradient(value, save)
    _forward(value, logits, mask, value, saved)
    return saved


def _forward(value: Tensor, logits: Tensor, mask: Tensor, y: Tensor, saved: Tensor | None) -> None:
    if value.numel() == 0:
        return
    with on_device(value):
        _C.cuda.modality_gate_forward(
            *value.shape, DTYPES[value.dtype], DTYPES[logits.dtype], logits.ndim == 2,
            *map(address, (value, logits, mask, y, saved)), stream(value),
        )  # fmt: skip


def backward(
    dy: Tensor, value: Tensor, logits: Tensor, mask: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    dvalue, dlogits = gradient(value, needs[0]), gradient(logits, needs[1])
    tokens, heads, _ = dy.shape
    if dy.numel() == 0:
        dlogits.zero_()
        return dvalue, dlogits
    part_tokens = max(8, -(-tokens // PARTS))
    summed = needs[1] and logits.ndim == 1
    parts = dy.new_empty((-(-tokens // part_tokens) if summed else 0, heads), dtype=torch.float32)
    with on_device(dy):
        _C.cuda.modality_gate_backward(
            *dy.shape, part_tokens, DTYPES[dy.dtype], DTYPES[logits.dtype], logits.ndim == 2,
            *map(address, (dy, value, logits, mask, dvalue, dlogits, parts)), stream(dy),
        )  # fmt: skip
    return dvalue, dlogits
