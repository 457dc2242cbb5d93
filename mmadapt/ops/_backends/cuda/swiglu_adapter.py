"""`swiglu_adapter` in CUDA C++ for Hopper (csrc/cuda/swiglu_adapter/kernel.cuh).

Forward and the gradient of x. The weights' gradients come from what the latter leaves behind:
`_swiglu_weights`, or the Triton kernels where that cannot serve. A backward in which x needs no
gradient is Triton's.
"""

import torch
from torch import Tensor

from mmadapt.ops._allocate import swiglu_adapter_gradients, swiglu_adapter_outputs
from mmadapt.ops._backends.cuda import _swiglu_weights as cuda_weights
from mmadapt.ops._backends.cuda._launch import (
    DTYPES,
    address,
    extension,
    on_device,
    stream,
    unsupported_device,
)
from mmadapt.ops._backends.triton import swiglu_adapter as triton_backend

_C = extension()
if not hasattr(_C.cuda, "swiglu_adapter_forward"):
    raise ImportError("mmadapt._C was built without sm_90a")

MAX_RANK = 128
MAX_DIM = 8192
MULTIPLE = 8
"""dim and rank: rows start at multiples of 16 bytes."""

MAX_WEIGHTS_COLUMNS = 64
"""(expert, rank) columns up to which CUDA makes the weights' gradients: at 128 Triton is faster (83
us against 91 for 8192 x 4096 in bf16 on an H100)."""

RESIDUALS = {"none": 0, "input": 1, "norm": 2}  # mmadapt_residual


def unsupported(
    x: Tensor,
    gate: Tensor,
    down: Tensor,
    up: Tensor,
    expert: Tensor | None,
    norm_weight: Tensor | None,
) -> str | None:
    """The constraint that rules this backend out, or None."""
    reason = unsupported_device("x", x, (torch.bfloat16, torch.float16), hopper=True)
    if reason is not None:
        return reason
    if (reason := triton_backend.unsupported(x, gate, down, up, expert, norm_weight)) is not None:
        return reason  # it makes the weights' gradients
    _, rank, dim = gate.shape
    for name, size in (("dim", dim), ("rank", rank)):
        if size % MULTIPLE != 0:
            return f"{name} {size} is not a multiple of {MULTIPLE}"
    if rank > MAX_RANK:
        return f"rank {rank} is larger than {MAX_RANK}"
    if x.shape[0] >= 2**31 - 256:
        return f"x has {x.shape[0]} rows, too many"
    if dim > MAX_DIM:
        return f"dim {dim} is larger than {MAX_DIM}"
    return None


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y [T, d], zg [T, m], zd [T, m], rstd [T] or [0]; see the reference backend."""
    outputs = swiglu_adapter_outputs(x, gate, norm_weight)
    if x.numel() == 0:
        return outputs
    x, gate, down, up, norm_weight = map(_aligned, (x, gate, down, up, norm_weight))
    packed = _room_for_packed(x, gate, down, up, norm_weight)
    with on_device(x):
        _C.cuda.swiglu_adapter_forward(
            *_problem(x, gate, down, up, expert, norm_weight, eps, residual, scale, packed),
            *map(address, outputs),
        )
    return outputs


def backward(
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
    needs: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dgate, ddown, dup, dnorm; size 0 and not computed where `needs` is false."""
    if not needs[0] or x.numel() == 0:
        return triton_backend.backward(
            dy, x, gate, down, up, expert, norm_weight, eps, zg, zd, rstd, residual, scale, needs
        )
    dy, x, gate, down, up, norm_weight = map(_aligned, (dy, x, gate, down, up, norm_weight))
    gradients = swiglu_adapter_gradients(x, gate, down, up, norm_weight, needs)
    dz, h = triton_backend.for_weights(x, gate, up, norm_weight, needs)
    rank, packed = gate.shape[1], _room_for_packed(x, gate, down, up, norm_weight)
    with on_device(x):
        _C.cuda.swiglu_adapter_dx(
            *_problem(x, gate, down, up, expert, norm_weight, eps, residual, scale, packed),
            *map(address, (dy, zg, zd, rstd, gradients[0], dz, h)),
            dz.shape[-1] // rank, h.shape[-1] // rank,
        )  # fmt: skip
        _weight_gradients(
            dy, x, gate, down, expert, norm_weight, rstd, residual, dz, h, gradients, needs
        )
    return gradients


def _weight_gradients(
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
    needs: tuple[bool, ...],
) -> None:
    """By the CUDA kernel, or by Triton's where that gives a reason why not (many experts, whose
    columns do not fit side by side) or is faster."""
    (experts, rank, _), ups = gate.shape, gradients[3].shape[0] if needs[3] else 1
    operands = (dy, x, gate, down, expert, norm_weight, rstd, residual, dz, h, gradients)
    faster = max(dz.shape[-1], h.shape[-1]) <= MAX_WEIGHTS_COLUMNS
    if faster and cuda_weights.unsupported(experts, ups, rank, dz, h) is None:
        cuda_weights.weight_gradients(*operands)
    else:
        triton_backend.weight_gradients(*operands, needs)


def _aligned(tensor: Tensor | None) -> Tensor | None:
    """A copy where the data do not start at a multiple of 16 bytes, as views may."""
    return tensor if tensor is None or tensor.data_ptr() % 16 == 0 else tensor.clone()


def _room_for_packed(
    x: Tensor, gate: Tensor, down: Tensor, up: Tensor, norm_weight: Tensor | None
) -> Tensor | None:
    """Memory for the weights as the products want them, where they are not so already."""
    if gate.dtype == x.dtype and norm_weight is None:
        return None
    return x.new_empty(gate.numel() + down.numel() + up.numel())


def _problem(
    x: Tensor,
    gate: Tensor,
    down: Tensor,
    up: Tensor,
    expert: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    residual: str,
    scale: float,
    packed: Tensor | None,
    cluster: int = 0,
    rows: int = 0,
) -> tuple[int | float, ...]:
    """What forward and backward share, in the order of mmadapt_swiglu_adapter_sm90."""
    experts, rank, dim = gate.shape
    norm_dtype = x.dtype if norm_weight is None else norm_weight.dtype
    return (
        x.shape[0], dim, rank, experts, up.shape[0],
        DTYPES[x.dtype], DTYPES[gate.dtype], DTYPES[norm_dtype], RESIDUALS[residual], scale, eps,
        cluster, rows,
        *map(address, (x, gate, down, up, expert, norm_weight, packed)), stream(x),
    )  # fmt: skip
