"""Adapter and low-rank linear with a backward written by hand, in the manner of Unsloth.

No new kernels: cuBLAS products that add in place, only what backward needs is saved, the hidden
units are computed again. One product a weight, as in Unsloth's LoRA functions.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu


class SwiGLU(torch.autograd.Function):
    """``base + (silu(n gate^T) * (n down^T)) up^T``; `base` is None where it is n itself."""

    @staticmethod
    def forward(ctx: Any, n: Tensor, base: Tensor | None, gate: Tensor, down: Tensor, up: Tensor):
        pre_gate, pre_down = n @ gate.t(), n @ down.t()
        ctx.save_for_backward(n, gate, down, up, pre_gate, pre_down)
        ctx.base_is_n = base is None
        return torch.addmm(n if base is None else base, silu(pre_gate).mul_(pre_down), up.t())

    @staticmethod
    def backward(ctx: Any, dy: Tensor):
        n, gate, down, up, pre_gate, pre_down = ctx.saved_tensors
        dh, activated = dy @ up, silu(pre_gate)
        dpre_gate = torch.ops.aten.silu_backward(dh * pre_down, pre_gate)
        dpre_down = dh.mul_(activated)
        hidden = activated.mul_(pre_down)
        dn = torch.addmm(dy, dpre_gate, gate) if ctx.base_is_n else dpre_gate @ gate
        dn.addmm_(dpre_down, down)
        dbase = None if ctx.base_is_n else dy
        return dn, dbase, dpre_gate.t() @ n, dpre_down.t() @ n, dy.t() @ hidden


def apply_mode(z: Tensor, mode: Tensor) -> Tensor:
    """``z * mode`` for [R], ``z mode`` for [R, R]."""
    return z * mode if mode.ndim == 1 else z @ mode


class LowRankGroup(torch.autograd.Function):
    """``x W_k^T + ((x a^T) mode_k) b^T`` for frozen W_1..W_K on one x, as one node."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, count: int, *rest: Tensor):
        weights, modes = rest[:count], rest[count:]
        z = x @ a.t()
        ctx.save_for_backward(x, a, b, z, *rest)
        ctx.count = count
        return tuple(
            (x @ weight.t()).addmm_(apply_mode(z, mode), b.t())
            for weight, mode in zip(weights, modes, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *dys: Tensor):
        x, a, b, z, *rest = ctx.saved_tensors
        weights, modes = rest[: ctx.count], rest[ctx.count :]
        dx = dz = db = None
        dmodes = []
        for dy, weight, mode in zip(dys, weights, modes, strict=True):
            scaled = dy @ b
            if mode.ndim == 1:
                dmodes.append((scaled * z).sum(0))
                part = scaled.mul_(mode)
            else:
                dmodes.append(z.t() @ scaled)
                part = scaled @ mode.t()
            dz = part if dz is None else dz.add_(part)
            update = dy.t() @ apply_mode(z, mode)
            db = update if db is None else db.add_(update)
            dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
        dx.addmm_(dz, a)
        return dx, dz.t() @ x, db, None, *(None for _ in weights), *dmodes


class LoRA(torch.autograd.Function):
    """``x W^T + s (x A^T) B^T`` with W frozen, on ``[..., in]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, s: float):
        rows = x.flatten(0, -2)
        z = rows @ a.t()
        ctx.save_for_backward(rows, weight, a, b, z)
        ctx.scale, ctx.shape = s, x.shape
        y = (rows @ weight.t()).addmm_(z, b.t(), alpha=s)
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor):
        rows, weight, a, b, z = ctx.saved_tensors
        dy = dy.flatten(0, -2)
        dz = (dy @ b).mul_(ctx.scale)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ weight).addmm_(dz, a).view(ctx.shape)
        db = (dy.t() @ z).mul_(ctx.scale)
        return dx, None, dz.t() @ rows, db, None


class LoRAMLP(torch.autograd.Function):
    """``down(silu(gate x) * up x)``, each with its LoRA: one node that saves x, gate x and up x.

    `weights` are (W, A, B) of gate, up and down in this order, W frozen.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: float, *weights: Tensor):
        rows = x.flatten(0, -2)
        gate, up = _lora(rows, *weights[0:3], s), _lora(rows, *weights[3:6], s)
        ctx.save_for_backward(rows, gate, up, *weights)
        ctx.scale, ctx.shape = s, x.shape
        y = _lora(silu(gate).mul_(up), *weights[6:9], s)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor):
        rows, gate, up, *weights = ctx.saved_tensors
        dy, s = dy.flatten(0, -2), ctx.scale
        activated = silu(gate)
        dh, *ddown = _lora_backward(dy, activated * up, *weights[6:9], s)
        dgate = torch.ops.aten.silu_backward(dh * up, gate)
        dup = dh.mul_(activated)
        dx, *dgates = _lora_backward(dgate, rows, *weights[0:3], s)
        dx_up, *dups = _lora_backward(dup, rows, *weights[3:6], s)
        dx.add_(dx_up)
        return dx.view(ctx.shape), None, None, *dgates, None, *dups, None, *ddown


def _lora(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, s: float) -> Tensor:
    return (x @ weight.t()).addmm_(x @ a.t(), b.t(), alpha=s)


def _lora_backward(
    dy: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, s: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dA, dB; x A^T is computed again."""
    dz = (dy @ b).mul_(s)
    dx = (dy @ weight).addmm_(dz, a)
    return dx, dz.t() @ x, (dy.t() @ (x @ a.t())).mul_(s)
