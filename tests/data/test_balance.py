"""Square-root balancing: the published ratios, the statistics, resuming, ranks."""

from itertools import islice

import pytest
import torch

from mmadapt.data import BalancedSampler, balanced_probabilities

# BLIVA's sets and the ratios its configuration publishes, six digits, some of them cut off.
SIZES = {
    "OCR-VQA": (800_000, 0.204821),
    "COCO-VQA": (444_728, 0.152713),
    "OK-VQA": (9_029, 0.021759),
    "A-OKVQA": (17_093, 0.029940),
    "COCO-caption": (567_993, 0.172584),
    "LLaVA": (362_206, 0.137818),
    "TextCaps": (110_006, 0.075952),
}
TWINS = ("COCO-VQA", "OK-VQA", "A-OKVQA")
MIX = (558_000, 665_000, 100_000, 10_000)


def test_published_ratios():
    names = [*SIZES, *TWINS]
    found = balanced_probabilities([SIZES[name][0] for name in names])
    assert sum(found) == pytest.approx(1)
    for name, probability in zip(names, found, strict=True):
        assert probability == pytest.approx(SIZES[name][1], abs=1e-6), name


def test_effective_epochs():
    found = balanced_probabilities(MIX)
    assert found == pytest.approx((0.377518, 0.412127, 0.159816, 0.050538), abs=5e-7)
    epochs = [32_000_000 * p / n for p, n in zip(found, MIX, strict=True)]
    assert epochs == pytest.approx((21.6, 19.8, 51.1, 161.7), abs=0.06)


def test_a_million_draws_follow_the_ratios():
    """Chi-squared of the sets (3 degrees of freedom) and of indices inside the smallest set."""
    sampler = BalancedSampler(MIX, seed=5)
    blocks = [sampler.draw_block(number) for number in range(245)]
    sets = torch.cat([s for s, _ in blocks])
    indices = torch.cat([i for _, i in blocks])
    assert len(sets) > 1_000_000
    expected = torch.tensor(sampler.probabilities, dtype=torch.float64) * len(sets)
    counts = torch.bincount(sets, minlength=4)
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # p = 0.001
    starts = torch.tensor([0, *MIX]).cumsum(0)
    assert ((indices >= starts[sets]) & (indices < starts[sets + 1])).all()
    inside = torch.bincount(indices[sets == 3] - starts[3], minlength=MIX[3]).double()
    mean = inside.sum() / MIX[3]
    statistic = ((inside - mean) ** 2 / mean).sum()
    assert abs(statistic - MIX[3]) < 3.3 * (2 * MIX[3]) ** 0.5


def test_any_number_of_sets_power_and_weights():
    assert balanced_probabilities([7]) == [1.0]
    assert balanced_probabilities([9, 1], power=1) == [0.9, 0.1]
    assert balanced_probabilities([9, 1], power=0) == [0.5, 0.5]
    assert balanced_probabilities([4, 1], weights=[1, 2]) == [0.5, 0.5]
    assert list(islice(BalancedSampler([1, 1], weights=[0, 1]), 2)) == [1, 1]


def test_batches_of_one_set():
    sampler = BalancedSampler([50, 50, 50], batch=4, num_samples=400, seed=1)
    drawn = [index // 50 for index in sampler]
    groups = [drawn[i : i + 4] for i in range(0, 400, 4)]
    assert all(len(set(group)) == 1 for group in groups)
    assert {group[0] for group in groups} == {0, 1, 2}


@pytest.mark.parametrize("stop", [0, 1, 100, 4096, 6000])
def test_resuming(stop):
    """A stream that was cut goes on as if it had not been; the epoch after it is whole again."""

    def make():
        sampler = BalancedSampler([30, 500], num_samples=9000, seed=3)
        sampler.set_epoch(2)
        return sampler

    whole = list(make())
    first = make()
    head = list(islice(first, stop))
    state = first.state_dict()
    second = BalancedSampler([30, 500], num_samples=9000, seed=3)
    second.load_state_dict(state)
    second.set_epoch(2)
    assert head + list(second) == whole
    assert list(second) == whole
    second.set_epoch(3)
    assert list(second) != whole and len(list(second)) == 9000


def test_every_rank_draws_the_same_and_global_state_does_not_matter():
    torch.manual_seed(0)
    one = list(BalancedSampler(MIX, num_samples=50, seed=4))
    torch.manual_seed(1)
    assert list(BalancedSampler(MIX, num_samples=50, seed=4)) == one
    assert list(BalancedSampler(MIX, num_samples=50, seed=5)) != one


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: balanced_probabilities([]), "sizes: expected data sets of at least one sample"),
        (lambda: balanced_probabilities([3, 0]), "sizes: expected data sets of at least one"),
        (lambda: balanced_probabilities([3], weights=[1, 1]), "weights: expected 1 numbers"),
        (lambda: BalancedSampler([3], batch=0), "batch: expected at least 1, got 0"),
        (lambda: BalancedSampler([3], num_samples=0), "num_samples: expected at least 1, got 0"),
        (
            lambda: BalancedSampler([3], seed=1).load_state_dict(BalancedSampler([3]).state_dict()),
            "saved with seed=0, this sampler has 1",
        ),
    ],
)
def test_wrong_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
