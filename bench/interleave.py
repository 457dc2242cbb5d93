"""Timing of alternatives against each other on a machine that others use too."""

import statistics
import time
from collections.abc import Callable


def interleaved_seconds(
    functions: dict[str, Callable[[], object]], rounds: int, warmup: int = 3
) -> dict[str, list[float]]:
    """Wall time of each function in each round; every round runs all of them, one after the other.

    Whatever disturbs the machine for longer than a call disturbs all alternatives alike. Each
    round starts with the next function, so that none always runs with the cache another left.
    """
    for _ in range(warmup):
        for function in functions.values():
            function()
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            functions[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def speedup(seconds: dict[str, list[float]], name: str, baseline: str) -> dict[str, float]:
    """Quartiles of baseline time / time over the rounds, and the ratio of the two minima."""
    pairs = zip(seconds[baseline], seconds[name], strict=True)
    low, middle, high = statistics.quantiles([b / a for b, a in pairs], n=4)
    best = min(seconds[baseline]) / min(seconds[name])
    return {"p25": low, "p50": middle, "p75": high, "of_minima": best}
