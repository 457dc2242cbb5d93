"""The `projected_modality_gate` contract: operators, autograd and the public function."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmadapt.ops import _checks as check
from mmadapt.ops._allocate import gradient, projected_modality_gate_outputs
from mmadapt.ops._autocast import cast_activation, cast_parameter
from mmadapt.ops._backends import select
from mmadapt.ops._library import define
from mmadapt.ops._value import fold_value

OP = "projected_modality_gate"


class Arguments(NamedTuple):
    """What the operators take: value [T, H, h], hidden [T, D], weight [H, D], mask [T]."""

    value: Tensor
    hidden: Tensor
    weight: Tensor
    mask: Tensor


def _forward(value, hidden, weight, mask, backend):
    operands = [t.contiguous() for t in (value, hidden, weight, mask)]
    return select(OP, backend, value.shape[0], *operands).forward(*operands)


def _forward_fake(value, hidden, weight, mask, backend):
    return projected_modality_gate_outputs(value)


def _backward(dy, value, hidden, weight, mask, gate, needs, backend):
    operands = [t.contiguous() for t in (value, hidden, weight, mask)]
    module = select(OP, backend, value.shape[0], *operands)
    return module.backward(dy.contiguous(), *operands, gate.contiguous(), tuple(needs))


def _backward_fake(dy, value, hidden, weight, mask, gate, needs, backend):
    return tuple(gradient(t, n) for t, n in zip((value, hidden, weight), needs, strict=True))


forward_op = define(
    "projected_modality_gate_fwd(Tensor value, Tensor hidden, Tensor weight, Tensor mask, "
    "str? backend) -> (Tensor y, Tensor gate)",
    _forward,
    _forward_fake,
)
backward_op = define(
    "projected_modality_gate_bwd(Tensor dy, Tensor value, Tensor hidden, Tensor weight, "
    "Tensor mask, Tensor gate, bool[3] needs, str? backend) "
    "-> (Tensor dvalue, Tensor dhidden, Tensor dweight)",
    _backward,
    _backward_fake,
)


class _ProjectedModalityGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, hidden, weight, mask, backend):
        y, gate = forward_op(value, hidden, weight, mask, backend)
        ctx.save_for_backward(value, hidden, weight, mask, gate)
        ctx.backend = backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        needs = list(ctx.needs_input_grad[:3])
        grads = backward_op(dy.contiguous(), *ctx.saved_tensors, needs, ctx.backend)
        wanted = (g if n else None for g, n in zip(grads, needs, strict=True))
        return *wanted, None, None


def arguments(value: Tensor, hidden: Tensor, weight: Tensor, mask: Tensor) -> Arguments:
    """Check and normalise the arguments of `projected_modality_gate`."""
    check.check_activation("value", value)
    check.check_activation("hidden", hidden)
    check.check_tensor("weight", weight)
    value, hidden = cast_activation(value), cast_activation(hidden)
    weight = cast_parameter(weight, value)
    check.check_ndim("weight", weight, (2,), "[H, D]")
    heads, width = weight.shape
    folded, mask_flat = fold_value(value, heads, mask)
    check.check_shape("hidden", hidden, (*mask.shape, width), "[..., D]")
    check.check_device("hidden", hidden, "value", value)
    if hidden.dtype != value.dtype:
        raise TypeError(f"hidden has dtype {hidden.dtype}, expected {value.dtype} like value")
    check.check_parameter("weight", weight, "value", value)
    flat = hidden.reshape(folded.shape[0], width).contiguous()
    return Arguments(folded, flat, weight.contiguous(), mask_flat)


def projected_modality_gate(
    value: Tensor, hidden: Tensor, weight: Tensor, mask: Tensor, *, backend: str | None = None
) -> Tensor:
    """`modality_gate` whose logits are ``hidden @ weight.T``, computed at masked tokens only.

    Args:
        value: ``[..., H, h]`` or ``[..., H * h]``, fp32, bf16, fp16 or fp64; under autocast cast to
            the autocast dtype.
        hidden: ``[..., D]``, the tensor that ``v_proj`` read, in the dtype of `value`.
        weight: ``[H, D]`` in that dtype or fp32. A zero weight erases the masked rows.
        mask: bool ``[...]``; rows where it is false pass bitwise and never reach a gradient.
        backend: name of a backend; None lets `mmadapt.explain` decide.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit.
        BackendError: the named backend cannot serve this call.

    Source: PILL's released code (arXiv 2311.02126), token-conditioned gate.
    """
    args = arguments(value, hidden, weight, mask)
    return _ProjectedModalityGate.apply(*args, backend).reshape(value.shape)
