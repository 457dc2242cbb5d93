"""Where the Triton kernels can run, and how they multiply fp32."""

import torch
import triton
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1 at import)."""


def unsupported_device(name: str, tensor: Tensor) -> str | None:
    """Why kernels cannot run on this tensor's device or dtype, or None."""
    if tensor.dtype not in DTYPES:
        return f"{name} is {tensor.dtype}, expected float32, bfloat16 or float16"
    if INTERPRETED:
        return (
            None
            if tensor.device.type == "cpu"
            else f"{name} is on {tensor.device}, expected cpu, because TRITON_INTERPRET=1"
        )
    if tensor.device.type != "cuda":
        return f"{name} is on {tensor.device}, expected cuda"
    if torch.version.hip is None and torch.cuda.get_device_capability(tensor.device) < (8, 0):
        return f"{name} is on a GPU older than compute capability 8.0"
    return None


def dot_precision(dtype: torch.dtype) -> str:
    """How kernels multiply tiles of `dtype`: Triton's `input_precision`, or "widened".

    fp32 products are exact unless torch was told to use TF32. The interpreter cannot multiply bf16
    tiles (numpy has no such type), so there kernels convert the operands to fp32 first.
    """
    if INTERPRETED and dtype == torch.bfloat16:
        return "widened"
    exact = dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
    return "ieee" if exact else "tf32"
