"""The `projected_modality_gate` contract: operators, autograd and the public function."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmadapt.ops import _checks as check
from mmadapt.ops._allocate import (
    gradient,
    projected_modality_gate_inplace_outputs,
    projected_modality_gate_outputs,
)
from mmadapt.ops._autocast import cast_activation, cast_parameter
from mmadapt.ops._backends import select
from mmadapt.ops._inplace import modified, overwrites, run_inplace
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


def _inplace(value, hidden, weight, mask, save, backend):
    operands = [t.contiguous() for t in (hidden, weight, mask)]
    module = select(OP, backend, value.shape[0], value, *operands)
    modified(value)
    return module.inplace(value, *operands, save)


def _inplace_fake(value, hidden, weight, mask, save, backend):
    modified(value)
    return projected_modality_gate_inplace_outputs(value, save)


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
# `saved`: the masked rows of `value` before gating; other rows are left unwritten.
inplace_op = define(
    "projected_modality_gate_inplace(Tensor(a!) value, Tensor hidden, Tensor weight, Tensor mask, "
    "bool save, str? backend) -> (Tensor saved, Tensor gate)",
    _inplace,
    _inplace_fake,
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


class _ProjectedModalityGateInplace(torch.autograd.Function):
    """Takes `value` as the caller has it: a view would drag its whole base through backward."""

    @staticmethod
    def forward(ctx, value, size, hidden, weight, mask, save, backend):
        folded = value.view(mask.shape[0], weight.shape[0], size)
        operands = (folded, hidden, weight, mask)
        saved, gate = run_inplace(inplace_op, value, *operands, save, backend)
        ctx.mark_dirty(value)
        ctx.save_for_backward(saved, hidden, weight, mask, gate)
        ctx.shape, ctx.backend = folded.shape, backend
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        saved, *others = ctx.saved_tensors
        needs = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
        grad = dy.reshape(ctx.shape).contiguous()
        # Nothing was saved if only dvalue is due, which does not read the value.
        before = saved if needs[1] or needs[2] else grad
        grads = backward_op(grad, before, *others, needs, ctx.backend)
        dvalue, dhidden, dweight = (g if n else None for g, n in zip(grads, needs, strict=True))
        dvalue = None if dvalue is None else dvalue.view(dy.shape)
        return dvalue, None, dhidden, dweight, None, None, None


def arguments(
    value: Tensor, hidden: Tensor, weight: Tensor, mask: Tensor, *, inplace: bool = False
) -> Arguments:
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
    value: Tensor,
    hidden: Tensor,
    weight: Tensor,
    mask: Tensor,
    *,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:
    """`modality_gate` whose logits are ``hidden @ weight.T``, computed at masked tokens only.

    Args:
        value: ``[..., H, h]`` or ``[..., H * h]``, fp32, bf16, fp16 or fp64; under autocast cast to
            the autocast dtype.
        hidden: ``[..., D]``, the tensor that ``v_proj`` read, in the dtype of `value`.
        weight: ``[H, D]`` in that dtype or fp32. A zero weight erases the masked rows.
        mask: bool ``[...]``; rows where it is false pass bitwise and never reach a gradient.
        inplace: as in `modality_gate`.
        backend: name of a backend; None lets `mmadapt.explain` decide.

    Raises:
        ValueError, TypeError, RuntimeError: as in `modality_gate`.
        BackendError: the named backend cannot serve this call.

    Source: PILL's released code (arXiv 2311.02126), token-conditioned gate.
    """
    args = arguments(value, hidden, weight, mask)
    if inplace and overwrites(value, hidden, weight, mask):
        save = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
        size = args.value.shape[-1]
        return _ProjectedModalityGateInplace.apply(value, size, *args[1:], save, backend)
    return _ProjectedModalityGate.apply(*args, backend).reshape(value.shape)
