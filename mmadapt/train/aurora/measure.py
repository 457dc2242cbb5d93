"""What training needs beside the frozen weights, counted and not guessed.

A process's peak memory cannot be told apart by method on a CPU, so the parts are counted: the
gradients, the optimizer's state, the momentum copies, and the tensors that one training step keeps
for its backward pass. On a GPU the peak that the allocator saw is recorded as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MIB = 2**20


@dataclass(frozen=True)
class Memory:
    """MiB. `saved`: kept for backward; `state`: gradients, optimizer state, momentum copies."""

    saved: float
    state: float
    peak: float | None = None


def training_memory(
    objective: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]
) -> Memory:
    """Counts over one more forward pass of `objective` on `batch`; no weight changes."""
    parameters = {p.untyped_storage().data_ptr() for p in objective.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = objective(**batch).loss
    del loss
    trained = [p for p in objective.parameters() if p.requires_grad]
    gradients = sum(p.nbytes for p in trained)
    state = sum(
        value.nbytes
        for entry in optimizer.state.values()
        for value in entry.values()
        if isinstance(value, Tensor)
    )
    momentum: Any = getattr(objective, "momentum", None)
    copies = 0
    if momentum is not None:
        copies = sum(b.nbytes for n, b in momentum.named_buffers() if n != "steps")
    peak = torch.cuda.max_memory_allocated() / MIB if torch.cuda.is_available() else None
    return Memory(sum(storages.values()) / MIB, (gradients + state + copies) / MIB, peak)
