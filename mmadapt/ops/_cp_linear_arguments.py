"""Checking and normalising the arguments of the `cp_linear` contract."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from mmadapt.ops import _checks as check
from mmadapt.ops._autocast import cast_activation, cast_parameter

_DROPOUT_AT = ("after", "before")


class Arguments(NamedTuple):
    """What the operators take: x [T, d_in] and one weight, bias and mode per output."""

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    factor_in: Tensor
    factor_out: Tensor
    modes: list[Tensor]


def dense(x, weights, biases, factor_in, factor_out, modes) -> Arguments:
    """All operands contiguous."""
    return Arguments(
        x.contiguous(),
        [w.contiguous() for w in weights],
        [None if b is None else b.contiguous() for b in biases],
        factor_in.contiguous(),
        factor_out.contiguous(),
        [m.contiguous() for m in modes],
    )


def arguments(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    factor_in: Tensor,
    factor_out: Tensor,
    modes: Sequence[Tensor],
    *,
    scale: float = 1.0,
    dropout: float = 0.0,
    dropout_at: str = "after",
) -> Arguments:
    """Check and normalise the arguments of `cp_linear_group`."""
    check.check_activation("x", x)
    check.check_choice("dropout_at", dropout_at, _DROPOUT_AT)
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
    biases = [None] * len(weights) if biases is None else list(biases)
    if not len(weights) == len(biases) == len(modes) > 0:
        raise ValueError(
            f"weights, biases and modes must have the same positive length, got {len(weights)}, "
            f"{len(biases)} and {len(modes)}"
        )
    x = cast_activation(x)
    check.check_tensor("factor_in", factor_in)
    check.check_tensor("factor_out", factor_out)
    check.check_ndim("factor_in", factor_in, (2,), "[R, d_in]")
    check.check_ndim("factor_out", factor_out, (2,), "[d_out, R]")
    if x.ndim < 1:
        raise ValueError("x has no dimensions, expected [..., d_in]")
    rank, dim_in, dim_out = factor_in.shape[0], x.shape[-1], factor_out.shape[0]
    check.check_shape("factor_in", factor_in, (rank, dim_in), "[R, d_in]")
    check.check_shape("factor_out", factor_out, (dim_out, rank), "[d_out, R]")
    for k, (weight, bias, mode) in enumerate(zip(weights, biases, modes, strict=True)):
        _check_member(k, weight, bias, mode, (dim_out, dim_in), rank)
    named = [("factor_in", factor_in), ("factor_out", factor_out)]
    for k, members in enumerate(zip(weights, biases, modes, strict=True)):
        names = (f"weights[{k}]", f"biases[{k}]", f"modes[{k}]")
        named += [(n, t) for n, t in zip(names, members, strict=True) if t is not None]
    for name, tensor in named:
        check.check_parameter(name, cast_parameter(tensor, x), "x", x)
    return dense(
        x.reshape(math.prod(x.shape[:-1]), dim_in),
        [cast_parameter(w, x) for w in weights],
        [None if b is None else cast_parameter(b, x) for b in biases],
        cast_parameter(factor_in, x),
        cast_parameter(factor_out, x),
        [cast_parameter(m, x) for m in modes],
    )


def _check_member(
    k: int,
    weight: Tensor,
    bias: Tensor | None,
    mode: Tensor,
    shape: tuple[int, int],
    rank: int,
) -> None:
    check.check_tensor(f"weights[{k}]", weight)
    check.check_shape(f"weights[{k}]", weight, shape, "[d_out, d_in]")
    if weight.requires_grad:
        raise ValueError(
            f"weights[{k}].requires_grad is True, expected a frozen weight: cp_linear never "
            "computes its gradient; call weight.requires_grad_(False) or pass weight.detach()"
        )
    if bias is not None:
        check.check_tensor(f"biases[{k}]", bias)
        check.check_shape(f"biases[{k}]", bias, shape[:1], "[d_out]")
    check.check_tensor(f"modes[{k}]", mode)
    expected = (rank,) if mode.ndim == 1 else (rank, rank)
    check.check_shape(f"modes[{k}]", mode, expected, "[R] or [R, R]")
