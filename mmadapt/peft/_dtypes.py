"""Dtypes of adapter weights beside activations."""

import torch
from torch import Tensor


def usable(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` as the ops take it: fp32 beside half-precision activations, else their dtype."""
    half = dtype in (torch.bfloat16, torch.float16)
    return weight if half and weight.dtype == torch.float32 else weight.to(dtype)
