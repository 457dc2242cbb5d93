"""Tile settings of the Triton kernels: shipped tables per GPU architecture, else a heuristic.

`configs/<arch>.json` holds what was measured: a list of entries
``{"kernel": ..., "dtype": ..., "dims": {...}, "config": {...}, "record": ...}``. A file of the same
form named by MMADAPT_TUNED (as the tuner writes it) is read before the shipped one.
"""

import contextlib
import functools
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

ENVIRONMENT_VARIABLE = "MMADAPT_TUNED"
_FOLDER = Path(__file__).parent / "configs"
_overrides: dict[str, Mapping[str, int]] = {}


def tiles(kernel: str, x: Tensor, default: Mapping[str, int], **dims: int) -> Mapping[str, int]:
    """Settings of `kernel` for a problem of size `dims` in the dtype and on the device of `x`.

    The entry with the nearest `dims` (in log2, each at most a factor of 2 away), else `default`.
    """
    if _overrides and kernel in _overrides:
        return _overrides[kernel]
    entry = _nearest(kernel, _architecture(x.device), x.dtype, tuple(sorted(dims.items())))
    return default if entry is None else entry


@contextlib.contextmanager
def override(configs: Mapping[str, Mapping[str, int]]) -> Iterator[None]:
    """Within the context the named kernels use these settings: for the tuner and benchmarks."""
    before = dict(_overrides)
    _overrides.update(configs)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


@functools.cache
def _architecture(device: torch.device) -> str:
    if device.type != "cuda" or torch.version.hip is not None:
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.lru_cache(maxsize=4096)
def _nearest(
    kernel: str, architecture: str, dtype: torch.dtype, dims: tuple[tuple[str, int], ...]
) -> Mapping[str, int] | None:
    wanted = dict(dims)
    best, least = None, math.inf
    for entry in entries(architecture):
        if entry["kernel"] != kernel or f"torch.{entry['dtype']}" != str(dtype):
            continue
        if entry["dims"].keys() != wanted.keys():
            continue
        steps = [abs(math.log2(max(wanted[n], 1) / entry["dims"][n])) for n in wanted]
        if max(steps) <= 1 and sum(steps) < least:
            best, least = entry["config"], sum(steps)
    return best


@functools.cache
def entries(architecture: str) -> list[dict]:
    """The tuned entries of an architecture, the user's before the shipped ones."""
    found: list[dict] = []
    files = [Path(os.environ[ENVIRONMENT_VARIABLE])] if ENVIRONMENT_VARIABLE in os.environ else []
    for path in (*files, _FOLDER / f"{architecture}.json"):
        if path.is_file():
            table = json.loads(path.read_text(encoding="utf-8"))
            if table["architecture"] == architecture:
                found += table["entries"]
    return found
