"""The SwiGLU adapter as a formula: plain torch, any float dtype, differentiated by autograd.

    n    = x                          or rms_norm(x) * weight
    A(n) = up_e (silu(gate_e n) * (down_e n))     with e = expert[t], the token's expert
    y    = base + scale * A(n)        base = x ("input"), n ("norm") or 0 ("none")

Sources: PILL (arXiv 2311.02126) adapters and its mixture of modality adapter experts;
CROME (arXiv 2408.06610), where the experts share ``up``.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear, silu


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """LLaMA's order: statistics in fp32 (fp64 for fp64), back to ``x.dtype``, then the weight."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * rstd).to(x.dtype) * weight


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
) -> Tensor:
    """``x [T, d]``, ``gate, down [E, m, d]``, ``up [E or 1, d, m]``, ``expert [T]`` in -1..E-1."""
    n = x if norm is None else rms_norm(x, *norm)
    if expert is None:
        expert = torch.zeros(x.shape[0], dtype=torch.int32, device=x.device)
    delta = torch.zeros_like(n)
    for e in range(gate.shape[0]):
        hidden = silu(linear(n, gate[e])) * linear(n, down[e])
        routed = linear(hidden, up[e % up.shape[0]])
        delta = torch.where((expert == e).unsqueeze(-1), routed, delta)
    base = {"input": x, "norm": n, "none": 0.0}[residual]
    return (base + scale * delta).to(x.dtype)
