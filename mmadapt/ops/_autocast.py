"""Autocast, applied by the public functions instead of by the dispatcher.

`torch.library.register_autocast` would cast every floating operand. Here the activation is cast to
the autocast dtype and fp32 parameters stay as they are: the backends convert them tile by tile and
return fp32 gradients, without a copy of the weight per call.
"""

import torch
from torch import Tensor

# Asked once: Dynamo of torch 2.11 cannot trace `is_autocast_available`.
AUTOCAST_DEVICES = frozenset(
    name
    for name in ("cpu", "cuda", "hpu", "mps", "mtia", "xla", "xpu")
    if torch.amp.is_autocast_available(name)
)


def cast_activation(x: Tensor) -> Tensor:
    """`x` in the autocast dtype when autocast is on for its device; fp64 is never cast."""
    dtype = _autocast_dtype(x)
    return x if dtype is None or x.dtype == torch.float64 else x.to(dtype)


def cast_parameter(parameter: Tensor, x: Tensor) -> Tensor:
    """`parameter`, converted to `x.dtype` if autocast is on and it is of another 16-bit type."""
    if parameter.dtype in (torch.float32, torch.float64) or _autocast_dtype(x) is None:
        return parameter
    return parameter.to(x.dtype)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    device_type = x.device.type
    if device_type not in AUTOCAST_DEVICES or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)
