"""Timing of alternatives against each other, in two modes that are always named beside a number.

``graph-cold``: a CUDA graph of many calls that rotate over cloned inputs larger than 3 x L2; no
launch overhead, no input in cache. ``eager-call``: a Python loop of calls on the host's clock; what
a user without graphs pays. Every round runs every alternative once, starting with the next one each
time, so that whatever drifts for longer than a call drifts for all.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Protocol

import torch

GRAPH, EAGER = "graph-cold", "eager-call"
MODES = (GRAPH, EAGER)
GRAPH_SECONDS = 2e-3
"""Length of one timed graph: events and its launch are then below 1 % of it."""


class Timer(Protocol):
    def start(self) -> Callable[[], float]:
        """Run once (perhaps only enqueue); returns a reader of seconds per call, for after sync."""


class GraphTimer:
    """Calls captured in one CUDA graph, timed by events around its replay."""

    def __init__(self, call: Callable[[int], object], slots: int, seconds: float = GRAPH_SECONDS):
        # An autograd graph that only a cycle keeps alive, of a failed call for instance, holds the
        # parameters' accumulators, which belong to the stream of that call: no backward could be
        # captured.
        gc.collect()
        # Of warm-up and captures alike: a backward runs on the stream of its forward.
        self.stream = torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):  # lazy initialisation must not be captured
            for i in range(max(3, slots)):
                call(i % slots)
        torch.cuda.current_stream().wait_stream(self.stream)
        torch.cuda.synchronize()
        self.calls = slots
        self.graph = self._capture(call, slots)
        once = min(self._timed() for _ in range(3))
        self.calls = slots * max(1, round(seconds / (once * slots)))
        if self.calls > slots:
            self.graph = self._capture(call, slots)

    def _capture(self, call: Callable[[int], object], slots: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            for i in range(self.calls):
                call(i % slots)
        return graph

    def _timed(self) -> float:
        read = self.start()
        torch.cuda.synchronize()
        return read()

    def start(self) -> Callable[[], float]:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        self.graph.replay()
        after.record()
        return lambda: before.elapsed_time(after) * 1e-3 / self.calls


class EagerTimer:
    """A loop of plain calls on the host's clock, the device waited for at its end."""

    def __init__(self, call: Callable[[int], object], slots: int, calls: int = 20):
        self.call, self.slots, self.calls = call, slots, calls
        for i in range(max(3, slots)):
            call(i % slots)

    def start(self) -> Callable[[], float]:
        synchronize()
        begin = time.perf_counter()
        for i in range(self.calls):
            self.call(i % self.slots)
        synchronize()
        seconds = (time.perf_counter() - begin) / self.calls
        return lambda: seconds


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleave(
    timers: dict[str, Timer], rounds: int, warmup_seconds: float = 0.2
) -> dict[str, list[float]]:
    """Seconds per call of every timer in every round."""
    begin = time.perf_counter()
    while True:
        for timer in timers.values():
            timer.start()
        synchronize()
        if time.perf_counter() - begin >= warmup_seconds:
            break
    names = list(timers)
    readers: dict[str, list[Callable[[], float]]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            readers[name].append(timers[name].start())
    synchronize()
    return {name: [read() for read in column] for name, column in readers.items()}


def quantile(values: list[float], q: float) -> float:
    """Linear interpolation between order statistics."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def spread(values: list[float]) -> dict[str, float]:
    return {f"p{round(100 * q)}": quantile(values, q) for q in (0.2, 0.5, 0.8)}


def ratios(ours: list[float], base: list[float]) -> dict[str, float]:
    """Quantiles over rounds of ours / base, each pair from one round."""
    return spread([a / b for a, b in zip(ours, base, strict=True)])


def what_counts(again: list[float], first: list[float]) -> float:
    """The A/A spread: how far from 1 equal code measures; a smaller difference says nothing."""
    return max(abs(r - 1) for r in ratios(again, first).values())
