"""Confidence intervals for the numbers a report prints. Standard library alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev


def wilson_interval(correct: float, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion, as fractions in [0, 1].

    Unlike the normal approximation it stays inside [0, 1] and is not empty at 0 % or 100 %,
    which is where a well-trained model on a small skill ends up.

    Source: E. B. Wilson, JASA 22 (1927) 209-212.

    Raises:
        ValueError: `total` < 1, `correct` outside [0, total], or `confidence` outside (0, 1).
    """
    if total < 1:
        raise ValueError(f"total: got {total}, expected at least 1")
    if not 0 <= correct <= total:
        raise ValueError(f"correct: got {correct}, expected a number in [0, {total}]")
    _check_confidence(confidence)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p, z2 = correct / total, z * z
    centre = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = z * math.sqrt(p * (1 - p) / total + z2 / (4 * total * total)) / (1 + z2 / total)
    # The exact bounds at p = 0 and p = 1 are 0 and 1; rounding may miss them by one ulp.
    low = 0.0 if correct == 0 else max(0.0, centre - half)
    high = 1.0 if correct == total else min(1.0, centre + half)
    return low, high


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Student-t interval of the mean of independent repetitions (for example seeds).

    A single value carries no information about spread: its interval is (nan, nan).

    Raises:
        ValueError: `values` is empty, or `confidence` outside (0, 1).
    """
    if not values:
        raise ValueError("values: got an empty sequence, expected at least one number")
    _check_confidence(confidence)
    if len(values) == 1:
        return math.nan, math.nan
    mean = fmean(values)
    half = _student_t_quantile(confidence, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: got {confidence}, expected a number in (0, 1)")


def _student_t_central_probability(t: float, df: int) -> float:
    """P(|T| <= t): the finite trigonometric sums for integer degrees of freedom.

    Source: Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    theta = math.atan(t / math.sqrt(df))
    cos, sin = math.cos(theta), math.sin(theta)
    if df % 2 == 0:
        term = total = 1.0
        for k in range(2, df - 1, 2):
            term *= (k - 1) / k * cos * cos
            total += term
        return sin * total
    term = total = cos if df > 1 else 0.0
    for k in range(3, df - 1, 2):
        term *= (k - 1) / k * cos * cos
        total += term
    return 2 / math.pi * (theta + sin * total)


def _student_t_quantile(confidence: float, df: int) -> float:
    low, high = 0.0, 1.0
    while _student_t_central_probability(high, df) < confidence:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        if _student_t_central_probability(middle, df) < confidence:
            low = middle
        else:
            high = middle
    return (low + high) / 2
