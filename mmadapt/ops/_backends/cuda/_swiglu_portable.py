"""The SwiGLU adapter's kernels for every GPU from sm_80 on (csrc/cuda/swiglu_adapter.cu)."""

import torch
from torch import Tensor

from mmadapt.ops._backends.cuda._launch import (
    DTYPES,
    address,
    extension,
    on_device,
    stream,
    unsupported_device,
)

_C = extension()

MAX_RANK = 128
MAX_DIM = 2**20
MULTIPLE = 8
"""dim and rank: rows start at multiples of 16 bytes."""

RESIDUALS = {"none": 0, "input": 1, "norm": 2}  # mmadapt_residual


def unsupported(x: Tensor, gate: Tensor) -> str | None:
    """Why these kernels cannot run, or None."""
    reason = unsupported_device("x", x, (torch.bfloat16, torch.float16))
    return unsupported_sizes(*x.shape, gate.shape[1]) if reason is None else reason


def unsupported_sizes(tokens: int, dim: int, rank: int) -> str | None:
    for name, size in (("dim", dim), ("rank", rank)):
        if size % MULTIPLE != 0:
            return f"{name} {size} is not a multiple of {MULTIPLE}"
    if rank > MAX_RANK:
        return f"rank {rank} is larger than {MAX_RANK}"
    if dim > MAX_DIM:
        return f"dim {dim} is larger than {MAX_DIM}"
    return f"x has {tokens} rows, too many" if tokens >= 2**31 - 64 else None


def forward(
    x: Tensor,
    gate: Tensor,
    down: Tensor,
    up: Tensor,
    expert: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    residual: str,
    scale: float,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Fill y, zg, zd and rstd; everything starts at multiples of 16 bytes."""
    workspace = room_for_packed(x, gate, up, norm_weight)
    with on_device(x):
        _C.cuda.swiglu_adapter_portable_forward(
            *_problem(x, gate, down, up, expert, norm_weight, eps, residual, scale, workspace),
            *map(address, outputs),
        )


def input_gradient(
    dy: Tensor,
    x: Tensor,
    gate: Tensor,
    down: Tensor,
    up: Tensor,
    expert: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    zg: Tensor,
    zd: Tensor,
    rstd: Tensor,
    residual: str,
    scale: float,
    dx: Tensor,
    dz: Tensor,
    h: Tensor,
) -> None:
    """Fill dx, and unless of size 0 dz and h (`for_weights` of the Triton backend)."""
    workspace, rank = room_for_packed(x, gate, up, norm_weight), gate.shape[1]
    with on_device(x):
        _C.cuda.swiglu_adapter_portable_dx(
            *_problem(x, gate, down, up, expert, norm_weight, eps, residual, scale, workspace),
            *map(address, (dy, zg, zd, rstd, dx, dz, h)),
            dz.shape[-1] // rank, h.shape[-1] // rank,
        )  # fmt: skip


def room_for_packed(x: Tensor, gate: Tensor, up: Tensor, norm_weight: Tensor | None) -> Tensor:
    """Memory for the weights that have to be packed: gate and down, and up if it is fp32."""
    convert = gate.dtype != x.dtype
    packed = 2 * gate.numel() if convert or norm_weight is not None else 0
    return x.new_empty(packed + (up.numel() if convert else 0))


def _problem(*operands, stages: int = 0) -> tuple[int | float, ...]:
    """What both calls share; `operands`: those of `problem`."""
    return problem(*operands, settings=(stages,))


def problem(
    x: Tensor,
    gate: Tensor,
    down: Tensor,
    up: Tensor,
    expert: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    residual: str,
    scale: float,
    packed: Tensor,
    *,
    settings: tuple[int, ...],
) -> tuple[int | float, ...]:
    """mmadapt_swiglu_adapter_gpu in the order of the bindings, with the kernels' own settings."""
    experts, rank, dim = gate.shape
    norm_dtype = x.dtype if norm_weight is None else norm_weight.dtype
    return (
        x.shape[0], dim, rank, experts, up.shape[0],
        DTYPES[x.dtype], DTYPES[gate.dtype], DTYPES[norm_dtype], RESIDUALS[residual], scale, eps,
        *settings, *map(address, (x, gate, down, up, expert, norm_weight, packed)), stream(x),
    )  # fmt: skip
