"""Folding of attention values and their token mask, shared by the two gate contracts."""

import math

from torch import Tensor

from mmadapt.ops import _checks as check


def fold_value(value: Tensor, heads: int, mask: Tensor) -> tuple[Tensor, Tensor]:
    """`value` as ``[T, H, h]`` and `mask` as ``[T]``, both contiguous, after checking them.

    Whether the heads of `value` are already split is read off the number of dimensions of `mask`.
    """
    check.check_tensor("mask", mask)
    check.check_bool("mask", mask)
    check.check_device("mask", mask, "value", value)
    lead = tuple(mask.shape)
    if value.ndim == mask.ndim + 2:
        check.check_shape("value", value, (*lead, heads, value.shape[-1]), "[..., H, h]")
        size = value.shape[-1]
    else:
        width = value.shape[-1] if value.ndim else 0
        check.check_shape("value", value, (*lead, width), "[..., H * h] or [..., H, h]")
        if heads == 0 or width % heads:
            raise ValueError(f"value has width {width}, expected a multiple of H = {heads}")
        size = width // heads
    tokens = math.prod(lead)
    return value.reshape(tokens, heads, size).contiguous(), mask.reshape(tokens).contiguous()
