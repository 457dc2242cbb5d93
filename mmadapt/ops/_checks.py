"""Argument checks shared by the contracts: errors name the argument, what came, what was due."""

import torch
from torch import Tensor

ACTIVATION_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGER_DTYPES = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, else fp32: the dtype of sums and statistics."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")


def check_activation(name: str, value: Tensor) -> None:
    check_tensor(name, value)
    if value.dtype not in ACTIVATION_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}")


def check_shape(name: str, value: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """Compare a whole shape; `meaning` spells it in symbols, for example ``[E, m, d]``."""
    if tuple(value.shape) != tuple(expected):
        raise ValueError(
            f"{name} has shape {list(value.shape)}, expected {meaning} = {list(expected)}"
        )


def check_ndim(name: str, value: Tensor, allowed: tuple[int, ...], meaning: str) -> None:
    if value.ndim not in allowed:
        raise ValueError(f"{name} has shape {list(value.shape)}, expected {meaning}")


def check_device(name: str, value: Tensor, reference_name: str, reference: Tensor) -> None:
    if value.device != reference.device:
        raise ValueError(
            f"{name} is on {value.device}, expected {reference.device} like {reference_name}"
        )


def check_parameter(name: str, value: Tensor, reference_name: str, reference: Tensor) -> None:
    """A parameter lies on the activation's device, in its dtype or in fp32 (not under fp64)."""
    check_device(name, value, reference_name, reference)
    allowed = {reference.dtype}
    if reference.dtype != torch.float64:
        allowed.add(torch.float32)
    if value.dtype not in allowed:
        names = " or ".join(sorted(str(dtype) for dtype in allowed))
        raise TypeError(
            f"{name} has dtype {value.dtype}, expected {names} for {reference_name} in "
            f"{reference.dtype}"
        )


def check_integer(name: str, value: Tensor) -> None:
    if value.dtype not in _INTEGER_DTYPES:
        raise TypeError(f"{name} must be an integer tensor, got {value.dtype}")


def check_bool(name: str, value: Tensor) -> None:
    if value.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor, got {value.dtype}")


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_expert_range(expert: Tensor | None, num_experts: int) -> None:
    """Values must lie in -1..E-1. CPU tensors only: on a GPU the answer would cost a sync."""
    if expert is None or expert.device.type != "cpu" or expert.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(expert))
    if low < -1 or high >= num_experts:
        raise ValueError(
            f"expert holds values {low}..{high}, expected -1..{num_experts - 1} "
            f"for {num_experts} expert(s) (-1 means no adapter)"
        )
