"""The factored linear layer as a formula: plain torch, differentiated by autograd.

    y = x W^T + b + scale * ((x factor_in^T) M) factor_out^T

``M`` is ``diag(mode)`` for a mode vector [R] (CP decomposition: lambda * p_k) or the mode itself
for a matrix [R, R] (the contracted core of the released code). ``W`` is frozen.
Source: Aurora (arXiv 2305.08381), mode approximation; branch dropout as in the released code,
on ``z M`` (its vision transformer) or on ``z`` (its text encoder), ``z = x factor_in^T``.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear


def keep_mask(seed: Tensor, rows: int, rank: int, dropout: float) -> Tensor:
    """Counter-based keep mask [rows, rank]: a hash of (seed, position), the same on every device.

    Splitmix64 on int64, whose products wrap; 24 bits of it are compared with the threshold.
    """
    index = torch.arange(rows * rank, device=seed.device).view(rows, rank)
    bits = index * -7046029254386353131 + seed
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        bits = (bits ^ (bits >> shift & (1 << 64 - shift) - 1)) * factor
    return (bits >> 40 & 0xFFFFFF) >= round(dropout * (1 << 24))


def apply_mode(z: Tensor, mode: Tensor) -> Tensor:
    """``z M`` for a mode vector or a mode matrix."""
    return z * mode if mode.ndim == 1 else z @ mode


def cp_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factor_in: Tensor,
    factor_out: Tensor,
    mode: Tensor,
    *,
    scale: float = 1.0,
    keep: Tensor | None = None,
    dropout: float = 0.0,
    dropout_at: str = "after",
) -> Tensor:
    """``x [T, i], weight [o, i], factor_in [R, i]``, ``factor_out [o, R]``, `keep` ``[T, R]``"""
    drop = 1.0 if keep is None else keep.to(x.dtype) / (1.0 - dropout)
    z = linear(x, factor_in)
    core = apply_mode(z * drop, mode) if dropout_at == "before" else apply_mode(z, mode) * drop
    return linear(x, weight, bias) + scale * linear(core, factor_out)
