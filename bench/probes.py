"""What a call costs beside time: peak memory, what it keeps for backward, its launches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.case import BACKWARD, BOTH, Case, as_tuple


def peak_bytes(call: Callable[[int], object], device: torch.device) -> int | None:
    """Largest memory of one call above what was allocated before it."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(device) - before


def saved_bytes(case: Case, provider: str) -> int:
    """Bytes of distinct storages kept for backward that are none of the case's own tensors."""
    tensors = case.inputs(provider)[0]
    own = {_storage(t) for t in tensors.values()}
    return kept_bytes(lambda: as_tuple(case.providers[provider].function(**tensors)), own)


def kept_bytes(forward: Callable[[], object], own: set[int]) -> int:
    """Bytes of distinct storages that `forward` keeps for backward, without those in `own`."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if (key := _storage(tensor)) not in own:
            kept[key] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # Held until the count is read, or a freed storage's address could serve twice.
        held = forward()
    total = sum(kept.values())
    del held
    return total


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def launches(call: Callable[[int], object], device: torch.device) -> int | None:
    """Kernels, copies and memsets of one call; None where the profiler cannot look."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    call(0)  # a backward runs its forward in the first call
    torch.cuda.synchronize()
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            call(0)
            torch.cuda.synchronize()
    except RuntimeError:  # CUPTI needs rights that some virtual machines do not give
        return None
    on_device = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return len(on_device) or None


def memory(case: Case, provider: str, kind: str) -> dict[str, int | None]:
    saved = kind == BOTH and case.providers[provider].gated
    call = case.make(provider, kind)
    if kind == BACKWARD:
        call(0)  # its forward
    return {
        "peak_bytes": peak_bytes(call, case.device),
        "saved_bytes": saved_bytes(case, provider) if saved else None,
    }
