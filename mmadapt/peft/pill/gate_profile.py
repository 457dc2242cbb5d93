"""Measure how open the value gates are (the paper's Figure 4)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from mmadapt.peft.pill.attention import PillAttention


class GateProfile:
    """Gate activations of the forward passes inside a `gate_profile` block."""

    def __init__(self, layers: list[PillAttention]) -> None:
        self._layers = layers
        self._sums = [torch.zeros(2, dtype=torch.float64) for _ in layers]

    def mean_abs(self) -> list[float]:
        """Mean |tanh gate| over image tokens and heads, per layer; nan where none was seen."""
        self._collect()
        return [(total / count).item() for total, count in self._sums]

    def _collect(self) -> None:
        for i, layer in enumerate(self._layers):
            for sums in layer.probe or ():
                self._sums[i] += sums.cpu()
            if layer.probe:
                layer.probe.clear()


@contextmanager
def gate_profile(model: nn.Module) -> Iterator[GateProfile]:
    """Record the gates of every layer; read the result with `.mean_abs()`, inside or after.

    Raises:
        ValueError: no layer has a gate.
    """
    layers = [m for m in model.modules() if isinstance(m, PillAttention) and m.has_gate]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no active PILL adapter with a gate")
    profile = GateProfile(layers)
    for layer in layers:
        layer.probe = []
    try:
        yield profile
    finally:
        profile._collect()
        for layer in layers:
            layer.probe = None
