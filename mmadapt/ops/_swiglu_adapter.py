"""The `swiglu_adapter` contract: operators, autograd and the public function."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmadapt.ops import _checks as check
from mmadapt.ops._allocate import swiglu_adapter_gradients, swiglu_adapter_outputs
from mmadapt.ops._autocast import cast_activation, cast_parameter
from mmadapt.ops._backends import select
from mmadapt.ops._library import define

OP = "swiglu_adapter"
RESIDUALS = ("input", "norm", "none")


class Arguments(NamedTuple):
    """What the operators take: leading dimensions folded into T, experts always a leading axis."""

    x: Tensor
    gate: Tensor
    down: Tensor
    up: Tensor
    expert: Tensor | None
    norm_weight: Tensor | None
    eps: float
    residual: str
    scale: float


def _forward(x, gate, down, up, expert, norm_weight, eps, residual, scale, backend):
    check.check_expert_range(expert, gate.shape[0])
    operands = [_contiguous(t) for t in (x, gate, down, up, expert, norm_weight)]
    module = select(OP, backend, x.shape[0], *operands)
    return module.forward(*operands, eps, residual, scale)


def _forward_fake(x, gate, down, up, expert, norm_weight, eps, residual, scale, backend):
    return swiglu_adapter_outputs(x, gate, norm_weight)


def _backward(
    dy, x, gate, down, up, expert, norm_weight, eps, zg, zd, rstd, residual, scale, needs, backend
):
    operands = [_contiguous(t) for t in (x, gate, down, up, expert, norm_weight)]
    saved = [_contiguous(t) for t in (zg, zd, rstd)]
    module = select(OP, backend, x.shape[0], *operands)
    return module.backward(dy.contiguous(), *operands, eps, *saved, residual, scale, tuple(needs))


def _backward_fake(
    dy, x, gate, down, up, expert, norm_weight, eps, zg, zd, rstd, residual, scale, needs, backend
):
    return swiglu_adapter_gradients(x, gate, down, up, norm_weight, tuple(needs))


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


forward_op = define(
    "swiglu_adapter_fwd(Tensor x, Tensor gate, Tensor down, Tensor up, Tensor? expert, "
    "Tensor? norm_weight, float eps, str residual, float scale, str? backend) "
    "-> (Tensor y, Tensor zg, Tensor zd, Tensor rstd)",
    _forward,
    _forward_fake,
)
backward_op = define(
    "swiglu_adapter_bwd(Tensor dy, Tensor x, Tensor gate, Tensor down, Tensor up, Tensor? expert, "
    "Tensor? norm_weight, float eps, Tensor zg, Tensor zd, Tensor rstd, str residual, "
    "float scale, bool[5] needs, str? backend) "
    "-> (Tensor dx, Tensor dgate, Tensor ddown, Tensor dup, Tensor dnorm)",
    _backward,
    _backward_fake,
)


class _SwiGLUAdapter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate, down, up, expert, norm_weight, eps, residual, scale, backend):
        y, zg, zd, rstd = forward_op(
            x, gate, down, up, expert, norm_weight, eps, residual, scale, backend
        )
        ctx.save_for_backward(x, gate, down, up, expert, norm_weight, zg, zd, rstd)
        ctx.settings = (eps, residual, scale, backend)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, gate, down, up, expert, norm_weight, zg, zd, rstd = ctx.saved_tensors
        eps, residual, scale, backend = ctx.settings
        of_x, of_gate, of_down, of_up, _, of_norm, *_ = ctx.needs_input_grad
        needs = [of_x, of_gate, of_down, of_up, of_norm]
        # Gradients arrive expanded (from `sum`) or permuted; backends index rows of dense memory.
        dx, dgate, ddown, dup, dnorm = backward_op(
            dy.contiguous(), x, gate, down, up, expert, norm_weight, eps, zg, zd, rstd,
            residual, scale, needs, backend,
        )  # fmt: skip
        return (
            dx if of_x else None,
            dgate if of_gate else None,
            ddown if of_down else None,
            dup if of_up else None,
            None,
            dnorm if of_norm else None,
            *(None,) * 4,
        )


def arguments(
    x: Tensor,
    gate: Tensor,
    down: Tensor,
    up: Tensor,
    *,
    expert: Tensor | None = None,
    norm: tuple[Tensor, float] | None = None,
    residual: str = "input",
    scale: float = 1.0,
) -> Arguments:
    """Check and normalise the arguments of `swiglu_adapter`."""
    check.check_activation("x", x)
    if x.ndim < 1:
        raise ValueError("x has no dimensions, expected [..., d]")
    check.check_choice("residual", residual, RESIDUALS)
    x = cast_activation(x)
    lead, dim = x.shape[:-1], x.shape[-1]
    for name, weight in (("gate", gate), ("down", down), ("up", up)):
        check.check_tensor(name, weight)
    gate, down, up = (cast_parameter(w, x) for w in (gate, down, up))
    check.check_ndim("gate", gate, (2, 3), "[m, d] or [E, m, d]")
    num_experts, rank = (1, gate.shape[0]) if gate.ndim == 2 else (gate.shape[0], gate.shape[1])
    axis, prefix = ((), "[") if gate.ndim == 2 else ((num_experts,), "[E, ")
    check.check_shape("gate", gate, (*axis, rank, dim), f"{prefix}m, d]")
    check.check_shape("down", down, (*axis, rank, dim), f"{prefix}m, d]")
    if up.ndim == 3 and up.shape[0] == 1:
        check.check_shape("up", up, (1, dim, rank), "[1, d, m]")
    else:
        check.check_shape("up", up, (*axis, dim, rank), f"{prefix}d, m]")
    for name, weight in (("gate", gate), ("down", down), ("up", up)):
        check.check_parameter(name, weight, "x", x)
    tokens = math.prod(lead)
    norm_weight, eps = _norm_arguments(norm, residual, x)
    return Arguments(
        x.reshape(tokens, dim).contiguous(),
        gate.reshape(num_experts, rank, dim).contiguous(),
        down.reshape(num_experts, rank, dim).contiguous(),
        up.reshape(-1 if up.ndim == 3 else 1, dim, rank).contiguous(),
        _expert_argument(expert, lead, num_experts, x),
        norm_weight,
        eps,
        residual,
        float(scale),
    )


def _norm_arguments(
    norm: tuple[Tensor, float] | None, residual: str, x: Tensor
) -> tuple[Tensor | None, float]:
    if norm is None:
        if residual == "norm":
            raise ValueError("residual='norm' needs norm=(weight, eps), got norm=None")
        return None, 0.0
    if not (isinstance(norm, tuple | list) and len(norm) == 2):
        raise TypeError(f"norm must be a pair (weight, eps), got {norm!r}")
    weight, eps = norm
    check.check_tensor("norm[0]", weight)
    weight = cast_parameter(weight, x)
    check.check_shape("norm[0]", weight, (x.shape[-1],), "[d]")
    check.check_parameter("norm[0]", weight, "x", x)
    return weight.contiguous(), float(eps)


def _expert_argument(
    expert: Tensor | None, lead: tuple[int, ...], num_experts: int, x: Tensor
) -> Tensor | None:
    if expert is None:
        if num_experts > 1:
            raise ValueError(
                f"expert is None but gate holds {num_experts} experts; expected an integer tensor "
                f"of shape x.shape[:-1] = {list(lead)}"
            )
        return None
    check.check_tensor("expert", expert)
    check.check_integer("expert", expert)
    check.check_shape("expert", expert, tuple(lead), "x.shape[:-1]")
    check.check_device("expert", expert, "x", x)
    if expert.dtype == torch.int64:  # what does not fit into int32 must not wrap into range
        expert = expert.clamp(-2, num_experts)
    return expert.reshape(math.prod(lead)).to(torch.int32).contiguous()


def swiglu_adapter(
    x: Tensor,
    gate: Tensor,
    down: Tensor,
    up: Tensor,
    *,
    expert: Tensor | None = None,
    norm: tuple[Tensor, float] | None = None,
    residual: str = "input",
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """SwiGLU bottleneck adapter, optionally normalised first and routed by expert.

    ``A(n) = up (silu(gate n) * (down n))``; returns ``base + scale * A(n)`` in the shape of `x`.

    Args:
        x: ``[..., d]``, fp32, bf16, fp16 or fp64. Under autocast it is cast to the autocast dtype
            and the result has that dtype.
        gate, down: ``[m, d]``, or ``[E, m, d]`` with one matrix per expert.
        up: ``[d, m]``, ``[E, d, m]``, or ``[1, d, m]`` shared by all experts. Weights have the
            dtype of `x` or fp32; their gradients have the dtype of the weight.
        expert: integers of shape ``x.shape[:-1]`` in -1..E-1; -1 returns the base alone. Required
            for more than one expert. The range is checked for CPU tensors only, because reading
            it from a GPU would wait for the device; there it is the caller's promise.
        norm: ``(weight [d], eps)``: ``n = rms_norm(x) * weight`` as in LLaMA; else ``n = x``.
        residual: base of the sum: ``"input"`` is `x`, ``"norm"`` is ``n``, ``"none"`` is 0.
        scale: factor on ``A(n)``.
        backend: name of a backend; None lets `mmadapt.explain` and its table decide.

    Raises:
        ValueError, TypeError: a shape, dtype, device or expert value that does not fit.
        BackendError: the named backend cannot serve this call.

    Sources: PILL (arXiv 2311.02126) adapters and modality experts; CROME (arXiv 2408.06610) with a
    shared `up`.
    """
    args = arguments(x, gate, down, up, expert=expert, norm=norm, residual=residual, scale=scale)
    return _SwiGLUAdapter.apply(*args, backend).reshape(x.shape)
