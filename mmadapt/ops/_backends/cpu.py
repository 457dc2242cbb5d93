"""`swiglu_adapter` in C++ (csrc/cpu): one pass over the tokens, OpenMP, AVX2 or AVX-512.

Reruns are bit-equal for the same number of threads (`torch.get_num_threads()`): work is cut by
position, and weight gradients are summed in the order of the pieces.
"""

import torch
from torch import Tensor

from mmadapt._extension import load_extension
from mmadapt.ops._allocate import swiglu_adapter_gradients, swiglu_adapter_outputs

_C, _reason = load_extension()
if _C is None:
    raise ImportError(f"mmadapt._C is {_reason}")

_DTYPES = {torch.float32: _C.F32, torch.bfloat16: _C.BF16}
_RESIDUALS = {
    "none": _C.RESIDUAL_NONE,
    "input": _C.RESIDUAL_INPUT,
    "norm": _C.RESIDUAL_NORM,
}


def unsupported(
    x: Tensor,
    gate: Tensor,
    down: Tensor,
    up: Tensor,
    expert: Tensor | None,
    norm_weight: Tensor | None,
) -> str | None:
    """The constraint that rules this backend out, or None."""
    if x.device.type != "cpu":
        return f"x is on {x.device}, expected cpu"
    if x.dtype not in _DTYPES:
        return f"x is {x.dtype}, expected torch.float32 or torch.bfloat16"
    weights = {"gate": gate, "down": down, "up": up}
    for name, weight in weights.items():
        if weight.dtype not in (x.dtype, torch.float32):
            return f"{name} is {weight.dtype}, expected {x.dtype} or torch.float32"
    if len({weight.dtype for weight in weights.values()}) > 1:
        return "gate, down and up differ in dtype"
    if norm_weight is not None and norm_weight.dtype not in _DTYPES:
        return f"norm weight is {norm_weight.dtype}, expected torch.float32 or torch.bfloat16"
    if min(gate.shape) == 0:
        return f"gate has no elements: {list(gate.shape)}"
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
    problem = _problem(x, gate, down, up, expert, norm_weight, eps, residual, scale)
    _C.swiglu_adapter_forward(problem, *map(_address, outputs))
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
    gradients = swiglu_adapter_gradients(x, gate, down, up, norm_weight, needs)
    problem = _problem(x, gate, down, up, expert, norm_weight, eps, residual, scale)
    _C.swiglu_adapter_backward(problem, *map(_address, (dy, zg, zd, rstd, *gradients)))
    return gradients


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


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
):
    norm_dtype = torch.float32 if norm_weight is None else norm_weight.dtype
    return _C.SwigluAdapter(
        sizes=(*x.shape, gate.shape[1], gate.shape[0], up.shape[0]),
        dtypes=(_DTYPES[x.dtype], _DTYPES[gate.dtype], _DTYPES[norm_dtype]),
        inputs=tuple(map(_address, (x, gate, down, up, expert, norm_weight))),
        residual=_RESIDUALS[residual],
        scale=scale,
        eps=eps,
        threads=torch.get_num_threads(),
    )
