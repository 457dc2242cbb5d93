"""The first record of a run: the machine, the versions, and what this GPU reached just now."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

COMMIT_VARIABLE = "MMADAPT_COMMIT"
"""Names the commit where the tree is a copy without git."""


def describe(device: torch.device, commit: str | None) -> dict[str, Any]:
    """Machine, versions, commit and measured ceilings."""
    found = {
        "kind": "run",
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "triton": _version_of_triton(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        **_commit(commit),
    }
    if device.type != "cuda":
        about = {"gpu": None, "name": "cpu", "l2_bytes": 0, "threads": torch.get_num_threads()}
        return found | about | {"ceilings": cpu_ceilings()}
    properties = torch.cuda.get_device_properties(device)
    return found | {
        "gpu": properties.name,
        "name": slug(properties.name),
        "sm_count": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "driver": _driver(),
        "ceilings": ceilings(device),
    }


def slug(gpu: str) -> str:
    """`NVIDIA H200` as in a file name: h200."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower().replace("nvidia", "")).strip("-")


def ceilings(device: torch.device, copy_bytes: int = 2**32, side: int = 8192) -> dict[str, float]:
    """Bytes/s of a large copy (read + written), FLOP/s of a square bf16 product of randn."""
    source = torch.zeros(copy_bytes // 2, dtype=torch.bfloat16, device=device)
    copy = _median_seconds(torch.empty_like(source).copy_, 10, source)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = _median_seconds(torch.mm, 30, a, b)
    del source, a, b
    torch.cuda.empty_cache()
    return {"bytes_per_s": 2 * copy_bytes / copy, "flops_per_s": 2 * side**3 / product}


def cpu_ceilings(copy_bytes: int = 2**26, side: int = 1024) -> dict[str, float]:
    """Bytes/s of a copy larger than the caches and FLOP/s of a square fp32 product, all threads."""
    source = torch.zeros(copy_bytes // 4)
    target = torch.empty_like(source)
    a, b = torch.randn(side, side), torch.randn(side, side)
    copy = _cpu_seconds(lambda: target.copy_(source))
    product = _cpu_seconds(lambda: torch.mm(a, b))
    return {"bytes_per_s": 2 * copy_bytes / copy, "flops_per_s": 2 * side**3 / product}


def _cpu_seconds(call: Callable[[], object], times: int = 5) -> float:
    call()
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def _median_seconds(call: Callable[..., object], times: int, *operands: torch.Tensor) -> float:
    for _ in range(5):
        call(*operands)
    events = []
    for _ in range(times):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        call(*operands)
        after.record()
        events.append((before, after))
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in events) * 1e-3


def _version_of_triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _driver() -> str | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
        return result.stdout.strip().splitlines()[0] if result.stdout.strip() else None
    return None


def _commit(given: str | None) -> dict[str, Any]:
    given = given or os.environ.get(COMMIT_VARIABLE)
    if given:
        return {"commit": given.removesuffix("-dirty"), "dirty": given.endswith("-dirty")}
    here = Path(__file__).resolve().parent
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=7"],
            cwd=here, capture_output=True, text=True, timeout=20,
        )  # fmt: skip
        name = result.stdout.strip()
        if result.returncode == 0 and name:
            return {"commit": name.removesuffix("-dirty"), "dirty": name.endswith("-dirty")}
    return {"commit": "unknown", "dirty": None}
