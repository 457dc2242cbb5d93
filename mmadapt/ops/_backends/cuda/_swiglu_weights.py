"""Gradients of the SwiGLU adapter's weights on Hopper (csrc/cuda/swiglu_weights_sm90.cu).

From what the gradient of x leaves behind, as the Triton kernels take it
(`mmadapt.ops._backends.triton.swiglu_adapter.for_weights`), which serve the rest.
"""

import torch
from torch import Tensor

from mmadapt.kernels.swiglu_adapter.triton_weights import column_sums
from mmadapt.ops._backends.cuda._launch import DTYPES, address, extension, stream

_C = extension()

MAX_COLUMNS = 128
"""(expert, rank) columns of dz and of h: each block holds the sums of all of them in registers."""


def unsupported(experts: int, ups: int, rank: int, dz: Tensor, h: Tensor) -> str | None:
    """Why these kernels cannot serve, or None.

    `dz` ``[2, T, .]`` and `h` ``[T, .]`` must hold a column for every rank of every one of the
    `experts` (h: of the `ups`), zeros outside a token's own: products cannot choose by token.
    """
    if rank % 8 != 0:
        return f"rank {rank} is not a multiple of 8"
    for name, narrow, count in (("dz", dz, experts), ("h", h, ups)):
        if narrow.numel() == 0:
            continue
        if narrow.shape[-1] != count * rank:
            return f"{name} has {narrow.shape[-1]} columns for {count} experts of rank {rank}"
        if narrow.shape[-1] > MAX_COLUMNS:
            return f"{name} has {narrow.shape[-1]} columns, at most {MAX_COLUMNS}"
    return None


def weight_gradients(
    dy: Tensor,
    x: Tensor,
    gate: Tensor,
    down: Tensor,
    expert: Tensor | None,
    norm_weight: Tensor | None,
    rstd: Tensor,
    residual: str,
    dz: Tensor,
    h: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Fill dgate, ddown, dup and dnorm, those that are not of size 0, from dz and h."""
    if dz.numel() == 0 and h.numel() == 0:
        return
    (tokens, dim), rank = x.shape, gate.shape[1]
    columns = [t.shape[-1] if t.numel() else 0 for t in (dz, h)]
    *_, floats = _C.cuda.swiglu_adapter_weights_plan(tokens, dim, *columns)
    parts = x.new_empty(floats, dtype=torch.float32)
    # Where the norm is also the base, its weight's gradient has a sum of its own, over all tokens:
    # those without an expert have a base too.
    through_base = residual == "norm" and norm_weight is not None and gradients[4].numel() > 0
    sums = column_sums(dy, x, rstd) if through_base else parts.new_empty(0, dim)
    norm_dtype = x.dtype if norm_weight is None else norm_weight.dtype
    _C.cuda.swiglu_adapter_weights(
        tokens, dim, rank, *(c // rank for c in columns),
        DTYPES[x.dtype], DTYPES[gate.dtype], DTYPES[norm_dtype],
        *map(address, (x, dy, dz, h, expert, norm_weight, gate, down, sums)), sums.shape[0],
        *map(address, (parts, *gradients[1:])), stream(x),
    )  # fmt: skip
