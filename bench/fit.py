"""A straight line through measurements over several orders of magnitude."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """``intercept + slope x``; `deviation` is the largest ``|y - line| / y``."""

    intercept: float
    slope: float
    deviation: float


def line(x: Sequence[float], y: Sequence[float]) -> Line:
    """Least squares of relative errors, so that small x count as much as large ones.

    Raises:
        ValueError: fewer than two distinct x, or a y that is not positive.
    """
    if len(set(x)) < 2 or len(x) != len(y):
        raise ValueError(f"a line needs two points or more, got x={list(x)}")
    if min(y) <= 0:
        raise ValueError(f"expected positive values, got {list(y)}")
    w = [1 / v**2 for v in y]
    total = sum(w)
    mean_x = sum(a * b for a, b in zip(w, x, strict=True)) / total
    mean_y = sum(a * b for a, b in zip(w, y, strict=True)) / total
    over = sum(a * (b - mean_x) * (c - mean_y) for a, b, c in zip(w, x, y, strict=True))
    under = sum(a * (b - mean_x) ** 2 for a, b in zip(w, x, strict=True))
    slope = over / under
    intercept = mean_y - slope * mean_x
    worst = max(abs(b - intercept - slope * a) / b for a, b in zip(x, y, strict=True))
    return Line(intercept, slope, worst)
