"""`swiglu_adapter` in CUDA C++: by kernels for Hopper (csrc/cuda/swiglu_adapter/) and, where
they cannot run, by those for every GPU from sm_80 on (`_swiglu_portable`).

Forward and the gradient of x. The weights' gradients come from what the latter leaves behind:
`_swiglu_weights`, or the Triton kernels where that cannot serve. A backward in which x needs no
gradient is Triton's.
"""

import torch
from torch import Tensor

from mmadapt.ops._allocate import swiglu_adapter_gradients, swiglu_adapter_outputs
from mmadapt.ops._backends.cuda import _swiglu_portable as portable
from mmadapt.ops._backends.cuda import _swiglu_weights as cuda_weights
from mmadapt.ops._backends.cuda._launch import (
    address,
    aligned,
    extension,
    on_device,
    unsupported_device,
)
from mmadapt.ops._backends.triton import swiglu_adapter as triton_backend

_C = extension()
if not hasattr(_C.cuda, "swiglu_adapter_portable_forward"):
    raise ImportError("mmadapt._C is older than its sources")

MAX_HOPPER_DIM = 8192
MAX_HOPPER_EXPERTS = 2**15

MAX_WEIGHTS_COLUMNS = 64
"""(expert, rank) columns up to which CUDA makes the weights' gradients: at 128 Triton is faster (83
us against 90 for 8192 x 4096 in bf16 on an H100)."""


def unsupported(
    x: Tensor,
    gate: Tensor,
    down: Tensor,
    up: Tensor,
    expert: Tensor | None,
    norm_weight: Tensor | None,
) -> str | None:
    """The constraint that rules this backend out, or None."""
    if (reason := portable.unsupported(x, gate)) is not None:
        return reason  # these take whatever the others do
    # Triton's kernels make the weights' gradients where those here cannot.
    return triton_backend.unsupported(x, gate, down, up, expert, norm_weight)


def kernels(x: Tensor, gate: Tensor) -> str:
    """Which kernels serve a call that is not `unsupported`: "hopper" or "portable"."""
    reason = unsupported_device("x", x, (torch.bfloat16, torch.float16), hopper=True)
    experts, _, dim = gate.shape
    fits = dim <= MAX_HOPPER_DIM and experts <= MAX_HOPPER_EXPERTS and x.shape[0] < 2**31 - 256
    return "hopper" if reason is None and fits else "portable"


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
    *,
    path: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y [T, d], zg [T, m], zd [T, m], rstd [T] or [0]; see the reference backend.

    `path`: what `kernels` would choose; tests name the other.
    """
    outputs = swiglu_adapter_outputs(x, gate, norm_weight)
    if x.numel() == 0:
        return outputs
    x, gate, down, up, norm_weight = map(aligned, (x, gate, down, up, norm_weight))
    if (path or kernels(x, gate)) == "portable":
        portable.forward(x, gate, down, up, expert, norm_weight, eps, residual, scale, outputs)
        return outputs
    packed = portable.room_for_packed(x, gate, up, norm_weight)
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
    *,
    path: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dgate, ddown, dup, dnorm; size 0 and not computed where `needs` is false.

    `path`: as in `forward`.
    """
    if not needs[0] or x.numel() == 0:
        return triton_backend.backward(
            dy, x, gate, down, up, expert, norm_weight, eps, zg, zd, rstd, residual, scale, needs
        )
    dy, x, gate, down, up, norm_weight = map(aligned, (dy, x, gate, down, up, norm_weight))
    gradients = swiglu_adapter_gradients(x, gate, down, up, norm_weight, needs)
    dz, h = triton_backend.for_weights(x, gate, up, norm_weight, needs)
    if (path or kernels(x, gate)) == "portable":
        portable.input_gradient(
            dy, x, gate, down, up, expert, norm_weight, eps, zg, zd, rstd, residual, scale,
            gradients[0], dz, h,
        )  # fmt: skip
        with on_device(x):
            triton_backend.weight_gradients(
                dy, x, gate, down, expert, norm_weight, rstd, residual, dz, h, gradients, needs
            )
        return gradients
    rank, packed = gate.shape[1], portable.room_for_packed(x, gate, up, norm_weight)
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


def _problem(*operands, cluster: int = 0, rows: int = 0) -> tuple[int | float, ...]:
    """What both calls for Hopper share; `operands`: those of `portable.problem`."""
    return portable.problem(*operands, settings=(cluster, rows))
