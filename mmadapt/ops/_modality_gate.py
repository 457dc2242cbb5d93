"""The `modality_gate` contract: operators, autograd and the public function."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmadapt.ops import _checks as check
from mmadapt.ops._allocate import gradient
from mmadapt.ops._autocast import cast_activation, cast_parameter
from mmadapt.ops._backends import select
from mmadapt.ops._library import define
from mmadapt.ops._value import fold_value

OP = "modality_gate"


class Arguments(NamedTuple):
    """What the operators take: value [T, H, h], logits [H] or [T, H], mask [T]."""

    value: Tensor
    logits: Tensor
    mask: Tensor


def _forward(value, logits, mask, backend):
    operands = [t.contiguous() for t in (value, logits, mask)]
    return select(OP, backend, value.shape[0], *operands).forward(*operands)


def _forward_fake(value, logits, mask, backend):
    return value.new_empty(value.shape)


def _backward(dy, value, logits, mask, needs, backend):
    operands = [t.contiguous() for t in (value, logits, mask)]
    module = select(OP, backend, value.shape[0], *operands)
    return module.backward(dy.contiguous(), *operands, tuple(needs))


def _backward_fake(dy, value, logits, mask, needs, backend):
    return gradient(value, needs[0]), gradient(logits, needs[1])


forward_op = define(
    "modality_gate_fwd(Tensor value, Tensor logits, Tensor mask, str? backend) -> Tensor",
    _forward,
    _forward_fake,
)
backward_op = define(
    "modality_gate_bwd(Tensor dy, Tensor value, Tensor logits, Tensor mask, bool[2] needs, "
    "str? backend) -> (Tensor dvalue, Tensor dlogits)",
    _backward,
    _backward_fake,
)


class _ModalityGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, logits, mask, backend):
        ctx.save_for_backward(value, logits, mask)
        ctx.backend = backend
        return forward_op(value, logits, mask, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        needs = list(ctx.needs_input_grad[:2])
        dvalue, dlogits = backward_op(dy.contiguous(), *ctx.saved_tensors, needs, ctx.backend)
        return dvalue if needs[0] else None, dlogits if needs[1] else None, None, None


def arguments(value: Tensor, logits: Tensor, mask: Tensor) -> Arguments:
    """Check and normalise the arguments of `modality_gate`."""
    check.check_activation("value", value)
    value = cast_activation(value)
    check.check_tensor("logits", logits)
    logits = cast_parameter(logits, value)
    check.check_ndim("logits", logits, (1, mask.ndim + 1), "[H] or [..., H]")
    heads = logits.shape[-1]
    folded, mask_flat = fold_value(value, heads, mask)
    if logits.ndim == mask.ndim + 1:
        check.check_shape("logits", logits, (*mask.shape, heads), "[..., H]")
        if mask.ndim != 0:
            logits = logits.reshape(folded.shape[0], heads)
    check.check_parameter("logits", logits, "value", value)
    return Arguments(folded, logits.contiguous(), mask_flat)


def modality_gate(
    value: Tensor, logits: Tensor, mask: Tensor, *, backend: str | None = None
) -> Tensor:
    """Multiply the attention values of masked tokens by ``tanh(logits)``, head by head.

    Args:
        value: ``[..., H, h]`` or ``[..., H * h]``, fp32, bf16, fp16 or fp64; under autocast cast to
            the autocast dtype.
        logits: ``[H]``, one gate per head, or ``[..., H]``, one per token and head, in the dtype
            of `value` or fp32. Zero logits erase the masked rows.
        mask: bool ``[...]``, the leading shape of `value`; rows where it is false pass bitwise.
        backend: name of a backend; None lets `mmadapt.explain` decide.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit.
        BackendError: the named backend cannot serve this call.

    Source: PILL (arXiv 2311.02126), modality attention gating, applied between ``v_proj`` and
    attention.
    """
    args = arguments(value, logits, mask)
    return _ModalityGate.apply(*args, backend).reshape(value.shape)
