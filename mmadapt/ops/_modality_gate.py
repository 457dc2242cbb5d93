"""The `modality_gate` contract: operators, autograd and the public function."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmadapt.ops import _checks as check
from mmadapt.ops._allocate import gradient
from mmadapt.ops._autocast import cast_activation, cast_parameter
from mmadapt.ops._backends import select
from mmadapt.ops._inplace import modified, overwrites, run_inplace
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


def _inplace(value, logits, mask, save, backend):
    operands = [t.contiguous() for t in (logits, mask)]
    module = select(OP, backend, value.shape[0], value, *operands)
    modified(value)
    return module.inplace(value, *operands, save)


def _inplace_fake(value, logits, mask, save, backend):
    modified(value)
    return gradient(value, save)


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
# `saved`: the masked rows of `value` before gating; other rows are left unwritten.
inplace_op = define(
    "modality_gate_inplace(Tensor(a!) value, Tensor logits, Tensor mask, bool save, "
    "str? backend) -> Tensor saved",
    _inplace,
    _inplace_fake,
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


class _ModalityGateInplace(torch.autograd.Function):
    """Takes `value` as the caller has it: a view would drag its whole base through backward."""

    @staticmethod
    def forward(ctx, value, size, logits, mask, save, backend):
        folded = value.view(mask.shape[0], logits.shape[-1], size)
        saved = run_inplace(inplace_op, value, folded, logits, mask, save, backend)
        ctx.mark_dirty(value)
        ctx.save_for_backward(saved, logits, mask)
        ctx.shape, ctx.backend = folded.shape, backend
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        saved, logits, mask = ctx.saved_tensors
        needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
        grad = dy.reshape(ctx.shape).contiguous()
        # Nothing was saved if only dvalue is due, which does not read the value.
        before = saved if needs[1] else grad
        dvalue, dlogits = backward_op(grad, before, logits, mask, needs, ctx.backend)
        dvalue = dvalue.view(dy.shape) if needs[0] else None
        return dvalue, None, dlogits if needs[1] else None, None, None, None


def arguments(value: Tensor, logits: Tensor, mask: Tensor, *, inplace: bool = False) -> Arguments:
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
    value: Tensor,
    logits: Tensor,
    mask: Tensor,
    *,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Multiply the attention values of masked tokens by ``tanh(logits)``, head by head.

    Args:
        value: ``[..., H, h]`` or ``[..., H * h]``, fp32, bf16, fp16 or fp64; under autocast cast to
            the autocast dtype.
        logits: ``[H]``, one gate per head, or ``[..., H]``, one per token and head, in the dtype
            of `value` or fp32. Zero logits erase the masked rows.
        mask: bool ``[...]``, the leading shape of `value`; rows where it is false pass bitwise.
        inplace: overwrite `value` and return it: only masked rows are read and written, instead of
            copying every row. Use the returned tensor, for a new one comes back all the same under
            torch.compile, where autocast changes the dtype, and where autograd tracks `value` as a
            view. `value` must be contiguous; torch's rules for in-place operations hold: no leaf
            that requires grad, no tensor that an earlier operation saved for its backward, and
            under activation checkpointing none that comes from outside of the checkpointed part.
        backend: name of a backend; None lets `mmadapt.explain` decide.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit; with `inplace` also a
            `value` that is not contiguous or shares memory with another argument.
        RuntimeError: with `inplace`, `value` is a leaf that requires grad or a view of one.
        BackendError: the named backend cannot serve this call.

    Source: PILL (arXiv 2311.02126), modality attention gating, applied between ``v_proj`` and
    attention.
    """
    args = arguments(value, logits, mask)
    if inplace and overwrites(value, logits, mask):
        save = torch.is_grad_enabled() and logits.requires_grad
        size = args.value.shape[-1]
        return _ModalityGateInplace.apply(value, size, args.logits, args.mask, save, backend)
    return _ModalityGate.apply(*args, backend).reshape(value.shape)
