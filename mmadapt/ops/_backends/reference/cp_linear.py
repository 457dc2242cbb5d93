"""`cp_linear` in plain torch, with an explicit backward.

The frozen product runs in the activation dtype, the low-rank branch in the accumulation dtype.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from mmadapt.kernels.cp_linear.reference import apply_mode, keep_mask
from mmadapt.ops._allocate import cp_linear_gradients, cp_linear_outputs
from mmadapt.ops._checks import accumulation_dtype


def unsupported(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    factor_in: Tensor,
    factor_out: Tensor,
    modes: Sequence[Tensor],
) -> str | None:
    return None


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    factor_in: Tensor,
    factor_out: Tensor,
    modes: Sequence[Tensor],
    seeds: Tensor | None,
    scale: float,
    dropout: float,
    dropout_at: str,
) -> tuple[list[Tensor], Tensor]:
    acc = accumulation_dtype(x.dtype)
    ys, saved = cp_linear_outputs(x, weights, factor_in)
    z = x.to(acc) @ factor_in.to(acc).t()
    saved.copy_(z)
    for k, y in enumerate(ys):
        core = _core(z, modes[k].to(acc), _drop(seeds, k, z, dropout), dropout_at)
        bias = biases[k]
        base = linear(x, weights[k].to(x.dtype), None if bias is None else bias.to(x.dtype))
        torch.add(base.to(acc), core @ factor_out.to(acc).t(), alpha=scale, out=y)
    return ys, saved


def backward(
    dys: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    factor_in: Tensor,
    factor_out: Tensor,
    modes: Sequence[Tensor],
    z: Tensor,
    seeds: Tensor | None,
    scale: float,
    dropout: float,
    dropout_at: str,
    needs: tuple[bool, bool, bool],
    needs_modes: tuple[bool, ...],
    needs_biases: tuple[bool, ...],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    acc = accumulation_dtype(x.dtype)
    grads = cp_linear_gradients(
        x, factor_in, factor_out, modes, biases, needs, needs_modes, needs_biases
    )
    dx, dfactor_in, dfactor_out, dmodes, dbiases = grads
    z, up = z.to(acc), factor_out.to(acc)
    dz, up_sum = torch.zeros_like(z), torch.zeros_like(up)
    dx_sum = torch.zeros(dx.shape, dtype=acc, device=x.device)
    for k, dy in enumerate(dys):
        wide, mode, drop = dy.to(acc), modes[k].to(acc), _drop(seeds, k, z, dropout)
        if needs_biases[k]:
            dbiases[k].copy_(wide.sum(0))
        if needs[2]:
            up_sum.addmm_(wide.t(), _core(z, mode, drop, dropout_at), alpha=scale)
        if needs[0]:
            dx_sum += dy @ weights[k].to(dy.dtype)
        if needs[0] or needs[1] or needs_modes[k]:
            dcore = scale * (wide @ up)
            dz += _through_core(dcore, z, mode, drop, dropout_at, dmodes[k], needs_modes[k])
    if needs[0]:
        dx.copy_(dx_sum.addmm_(dz, factor_in.to(acc)))
    if needs[1]:
        dfactor_in.copy_(dz.t() @ x.to(acc))
    if needs[2]:
        dfactor_out.copy_(up_sum)
    return grads


def _drop(seeds: Tensor | None, k: int, z: Tensor, dropout: float) -> Tensor | None:
    """0 or 1 / (1 - dropout) for every entry of z; None without dropout."""
    if seeds is None:
        return None
    return keep_mask(seeds[k], *z.shape, dropout).to(z.dtype) / (1.0 - dropout)


def _core(z: Tensor, mode: Tensor, drop: Tensor | None, dropout_at: str) -> Tensor:
    if drop is None:
        return apply_mode(z, mode)
    return apply_mode(z * drop, mode) if dropout_at == "before" else apply_mode(z, mode) * drop


def _through_core(
    dcore: Tensor,
    z: Tensor,
    mode: Tensor,
    drop: Tensor | None,
    dropout_at: str,
    dmode: Tensor,
    needs_mode: bool,
) -> Tensor:
    """Gradient of z from that of the core; fills `dmode` if needed."""
    before = drop is not None and dropout_at == "before"
    if drop is not None and not before:
        dcore = dcore * drop
    inner = z * drop if before else z
    if needs_mode:
        dmode.copy_((inner * dcore).sum(0) if mode.ndim == 1 else inner.t() @ dcore)
    dz = apply_mode(dcore, mode.t() if mode.ndim == 2 else mode)
    return dz * drop if before else dz
