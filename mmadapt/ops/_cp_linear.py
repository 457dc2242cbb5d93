"""The `cp_linear` contract: operators, autograd and the two public functions.

One weight is a group of one: both public functions run the same pair of operators.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmadapt.ops._allocate import cp_linear_gradients, cp_linear_outputs
from mmadapt.ops._backends import select
from mmadapt.ops._cp_linear_arguments import arguments, dense
from mmadapt.ops._library import define

OP = "cp_linear"


def _forward(
    x, weights, biases, factor_in, factor_out, modes, seeds, scale, dropout, dropout_at, backend
):
    operands = dense(x, weights, biases, factor_in, factor_out, modes)
    module = select(OP, backend, x.shape[0], *operands)
    return module.forward(*operands, seeds, scale, dropout, dropout_at)


def _forward_fake(
    x, weights, biases, factor_in, factor_out, modes, seeds, scale, dropout, dropout_at, backend
):
    return cp_linear_outputs(x, weights, factor_in)


def _backward(
    dys, x, weights, biases, factor_in, factor_out, modes, z, seeds, scale, dropout, dropout_at,
    needs, needs_modes, needs_biases, backend,
):  # fmt: skip
    operands = dense(x, weights, biases, factor_in, factor_out, modes)
    module = select(OP, backend, x.shape[0], *operands)
    return module.backward(
        [dy.contiguous() for dy in dys], *operands, z.contiguous(), seeds, scale, dropout,
        dropout_at, tuple(needs), tuple(needs_modes), tuple(needs_biases),
    )  # fmt: skip


def _backward_fake(
    dys, x, weights, biases, factor_in, factor_out, modes, z, seeds, scale, dropout, dropout_at,
    needs, needs_modes, needs_biases, backend,
):  # fmt: skip
    return cp_linear_gradients(
        x, factor_in, factor_out, modes, biases, needs, needs_modes, needs_biases
    )


_OPERANDS = (
    "Tensor x, Tensor[] weights, Tensor?[] biases, Tensor factor_in, Tensor factor_out, "
    "Tensor[] modes, "
)
_SETTINGS = "Tensor? seeds, float scale, float dropout, str dropout_at, "
forward_op = define(
    f"cp_linear_fwd({_OPERANDS}{_SETTINGS}str? backend) -> (Tensor[] ys, Tensor z)",
    _forward,
    _forward_fake,
)
backward_op = define(
    f"cp_linear_bwd(Tensor[] dys, {_OPERANDS}Tensor z, {_SETTINGS}bool[3] needs, "
    "bool[] needs_modes, bool[] needs_biases, str? backend) "
    "-> (Tensor dx, Tensor dfactor_in, Tensor dfactor_out, Tensor[] dmodes, Tensor[] dbiases)",
    _backward,
    _backward_fake,
)


class _CPLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scale, dropout, dropout_at, backend, seeds, x, factor_in, factor_out, *rest):
        count = len(rest) // 3
        modes, biases, weights = rest[:count], rest[count : 2 * count], rest[2 * count :]
        ys, z = forward_op(
            x, weights, biases, factor_in, factor_out, modes, seeds, scale, dropout, dropout_at,
            backend,
        )  # fmt: skip
        ctx.save_for_backward(seeds, x, factor_in, factor_out, z, *rest)
        ctx.settings = (scale, dropout, dropout_at)
        ctx.backend = backend
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        seeds, x, factor_in, factor_out, z, *rest = ctx.saved_tensors
        count = len(rest) // 3
        modes, biases, weights = rest[:count], rest[count : 2 * count], rest[2 * count :]
        needs = list(ctx.needs_input_grad[5:])
        of_shared, of_modes, of_biases = needs[:3], needs[3 : 3 + count], needs[3 + count :][:count]
        *shared, dmodes, dbiases = backward_op(
            [dy.contiguous() for dy in dys], x, weights, biases, factor_in, factor_out, modes, z,
            seeds, *ctx.settings, of_shared, of_modes, of_biases, ctx.backend,
        )  # fmt: skip
        grads = [*shared, *dmodes, *dbiases]
        wanted = [g if n else None for g, n in zip(grads, needs[: len(grads)], strict=True)]
        return (*(None,) * 5, *wanted, *(None,) * count)


def cp_linear_group(
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
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """`cp_linear` for several weights on one input (q, k, v): ``x @ factor_in.T`` once.

    `weights`, `biases` (or None for none) and `modes` have one entry per output; all weights have
    the same shape. Dropout masks of different weights are independent. Returns one tensor per
    weight.
    """
    args = arguments(
        x, weights, biases, factor_in, factor_out, modes,
        scale=scale, dropout=dropout, dropout_at=dropout_at,
    )  # fmt: skip
    # The masks are a function of seeds drawn here, from torch's generator, so that activation
    # checkpointing and compiled graphs, which restore its state, replay them.
    seeds = None
    if dropout > 0.0:
        seeds = torch.randint(2**62, (len(args.weights),), device=x.device, dtype=torch.int64)
    ys = _CPLinear.apply(
        float(scale), float(dropout), dropout_at, backend, seeds, args.x, args.factor_in,
        args.factor_out, *args.modes, *args.biases, *args.weights,
    )  # fmt: skip
    return tuple(y.reshape(*x.shape[:-1], y.shape[-1]) for y in ys)


def cp_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factor_in: Tensor,
    factor_out: Tensor,
    mode: Tensor,
    *,
    scale: float = 1.0,
    dropout: float = 0.0,
    dropout_at: str = "after",
    backend: str | None = None,
) -> Tensor:
    """Frozen linear layer plus a low-rank update: ``x W^T + b + scale * z M factor_out^T``.

    ``z = x factor_in^T``; ``M`` is ``diag(mode)`` or `mode`.

    Args:
        x: ``[..., d_in]``, fp32, bf16, fp16 or fp64; under autocast cast to the autocast dtype.
        weight: ``[d_out, d_in]``, frozen: it never gets a gradient.
        bias: ``[d_out]`` or None.
        factor_in: ``[R, d_in]``; factor_out: ``[d_out, R]``; usually shared by many layers.
        mode: ``[R]`` (the paper's lambda * p_k) or ``[R, R]`` (the released code's contracted
            core). All parameters have the dtype of `x` or fp32; gradients have the parameter's
            dtype.
        scale: factor on the update.
        dropout: probability of dropping an entry of the update's [..., R] activations.
        dropout_at: ``"after"`` drops ``z M``, ``"before"`` drops ``z``.
        backend: name of a backend; None lets `mmadapt.explain` decide.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit; a weight that requires
            a gradient.
        BackendError: the named backend cannot serve this call.

    Source: Aurora (arXiv 2305.08381), mode approximation.
    """
    (y,) = cp_linear_group(
        x, [weight], [bias], factor_in, factor_out, [mode],
        scale=scale, dropout=dropout, dropout_at=dropout_at, backend=backend,
    )  # fmt: skip
    return y
