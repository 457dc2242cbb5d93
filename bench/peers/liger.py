"""Liger's fused silu * mul (and RMSNorm) between cuBLAS products. Optional dependency."""

import importlib.util

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.case import BOTH, FORWARD, Provider
from bench.cases import EPS

KINDS = (FORWARD, BOTH)
"""No backward alone: Liger's overwrites what it saved, so it cannot run twice."""


def adapter(device: torch.device) -> Provider:
    return Provider(_adapter, kinds=KINDS, skip=missing(device))


def missing(device: torch.device) -> str | None:
    """Why Liger cannot run here, or None."""
    if importlib.util.find_spec("liger_kernel") is None:
        return "not installed"
    return "its kernels need a GPU" if device.type == "cpu" else None


def _adapter(
    x: Tensor, gate: Tensor, down: Tensor, up: Tensor, weight: Tensor | None = None
) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    gate, down, up = (w.to(x.dtype) for w in (gate, down, up))
    n = x
    if weight is not None:
        n = LigerRMSNormFunction.apply(x, weight.to(x.dtype), EPS, 0.0, "llama", False)
    hidden = LigerSiLUMulFunction.apply(linear(n, gate), linear(n, down))
    return torch.addmm(x, hidden, up.t())
