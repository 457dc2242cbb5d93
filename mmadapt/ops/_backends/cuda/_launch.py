"""What the CUDA backends share: the compiled module, addresses, streams, and where it can run.

A backend module starts with ``_C = extension()`` and calls ``_C.cuda.NAME(...)`` within
``on_device(x)``, passing ``address(tensor)`` for pointers and ``stream(x)`` for the stream.
"""

import functools
import re
from collections.abc import Iterable
from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor

from mmadapt._extension import load_extension
from mmadapt.kernels.common.device import on_device

__all__ = [
    "DTYPES",
    "address",
    "aligned",
    "extension",
    "on_device",
    "stream",
    "unsupported_device",
]

# As mmadapt_dtype in csrc/include/mmadapt/status.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def extension() -> ModuleType:
    """`mmadapt._C` with its CUDA kernels.

    Raises:
        ImportError: it is absent, or was built without CUDA; the message says why.
    """
    module, reason = load_extension()
    if module is None:
        raise ImportError(f"mmadapt._C is {reason}")
    info = module.build_info()
    if "cuda_archs" not in info:
        raise ImportError(
            f"mmadapt._C was built without CUDA ({info.get('cuda_absent', 'it is older')})"
        )
    return module


def address(tensor: Tensor | None) -> int:
    """Where the data of a tensor start; 0 for None and for tensors without elements."""
    return 0 if tensor is None else tensor.data_ptr()


Operand = TypeVar("Operand", Tensor, Tensor | None)


def aligned(tensor: Operand) -> Operand:
    """A copy where the data do not start at a multiple of 16 bytes, as views may."""
    return tensor if tensor is None or tensor.data_ptr() % 16 == 0 else tensor.clone()


def stream(tensor: Tensor) -> int:
    """Handle of torch's current stream on the tensor's device (a `cudaStream_t`)."""
    # As torch's own generated code asks, at a tenth of the time of current_stream().cuda_stream.
    return torch._C._cuda_getCurrentRawStream(tensor.device.index)


def unsupported_device(
    name: str,
    tensor: Tensor,
    dtypes: Iterable[torch.dtype] = tuple(DTYPES),
    hopper: bool = False,
) -> str | None:
    """Why kernels cannot run on this tensor's dtype or device, or None.

    `hopper`: kernels that were compiled for sm_90a alone.
    """
    if tensor.dtype not in dtypes:
        return f"{name} is {tensor.dtype}, expected {' or '.join(map(str, dtypes))}"
    if tensor.device.type != "cuda":
        if tensor.device.type == "cpu" and not torch.cuda.is_available():
            return f"{name} is on cpu, expected cuda; there is no GPU here"
        return f"{name} is on {tensor.device}, expected cuda"
    if torch.version.cuda is None:
        return "this torch is not built with CUDA"
    return unsupported_gpu(tensor.device.index, hopper)


@functools.cache
def unsupported_gpu(index: int, hopper: bool) -> str | None:
    """Why this GPU cannot run the extension's kernels, or None; `hopper` as above."""
    return unsupported_capability(
        torch.cuda.get_device_capability(index), extension().build_info()["cuda_archs"], hopper
    )


def unsupported_capability(capability: tuple[int, int], archs: str, hopper: bool) -> str | None:
    """Why a GPU cannot run what was compiled for `archs` ("sm_80 sm_90a compute_90"), or None."""
    has = "compute capability {}.{}".format(*capability)
    if hopper:
        if capability != (9, 0):
            return f"{has}, needs 9.0"
        return None if "sm_90a" in archs.split() else f"the extension has no sm_90a code: {archs}"
    if any(_runs(capability, arch) for arch in archs.split()):
        return None
    return f"{has}; the extension was compiled for {', '.join(archs.split())}"


def _runs(capability: tuple[int, int], arch: str) -> bool:
    """Machine code runs on the same major version from its minor on, PTX on everything later."""
    kind, number, suffix = re.fullmatch(r"(sm|compute)_(\d+)([af]?)", arch).groups()
    compiled = divmod(int(number), 10)
    if suffix == "a":  # for that very GPU
        return capability == compiled
    if kind == "compute" and not suffix:
        return capability >= compiled
    return capability[0] == compiled[0] and capability >= compiled
