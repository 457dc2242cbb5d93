from __future__ import annotations

import math

import pytest

from mmadapt.eval import mean_interval, wilson_interval


def test_wilson_against_published_values():
    # Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def test_wilson_is_closed_at_the_ends_and_symmetric():
    assert wilson_interval(0, 7)[0] == 0
    assert wilson_interval(7, 7)[1] == 1
    low, high = wilson_interval(3, 10)
    assert wilson_interval(7, 10) == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize("n", [2, 3, 4, 7, 30])
def test_mean_interval_against_scipy(n):
    stats = pytest.importorskip("scipy.stats")
    values = [((7 * i) % 11) / 3 for i in range(n)]
    expected = stats.t.interval(0.95, n - 1, loc=sum(values) / n, scale=stats.sem(values))
    assert mean_interval(values) == pytest.approx(expected, rel=1e-9)


def test_mean_interval_of_three_seeds():
    # t(0.975, 2) = 4.3027
    low, high = mean_interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)))


def test_one_seed_has_no_interval():
    assert all(math.isnan(bound) for bound in mean_interval([5.0]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wilson_interval(0, 0), "total: got 0"),
        (lambda: wilson_interval(5, 4), "correct: got 5"),
        (lambda: wilson_interval(1, 4, confidence=95), "confidence: got 95"),
        (lambda: mean_interval([]), "values: got an empty sequence"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
