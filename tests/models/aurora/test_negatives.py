"""Hard negatives: never the same id, and distributed as the similarities say."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmadapt.models.aurora import sample_negatives

DRAWS = 100_000


def chi_square(counts, expected):
    return float(((counts - expected) ** 2 / expected).sum())


def test_draws_follow_the_softmax_without_the_same_id():
    logits = torch.tensor([0.3, -1.0, 2.0, 1.0, 0.0, 0.5])
    ids = torch.tensor([0, 1, 2, 2, 3, 0])
    generator = torch.Generator().manual_seed(0)
    rows = logits.expand(DRAWS, -1)
    drawn = sample_negatives(rows, torch.full((DRAWS,), 2), ids, generator=generator)
    assert bool(drawn.valid.all())
    counts = torch.bincount(drawn.index, minlength=6).double()
    assert counts[2] == counts[3] == 0
    weights = logits.softmax(0).double()
    weights[[2, 3]] = 0  # as the released loop does it
    expected = DRAWS * weights / weights.sum()
    keep = expected > 0
    # 3 degrees of freedom: p > 0.01 below 11.34
    assert chi_square(counts[keep], expected[keep]) < 11.34


def test_a_negative_too_unlikely_for_a_float_is_still_found():
    # softmax over everything gives candidate 1 a weight of exp(-1000) = 0: the released loop fails
    logits = torch.tensor([[1000.0, 0.0]])
    drawn = sample_negatives(logits, torch.tensor([5]), torch.tensor([5, 6]))
    assert drawn.index.tolist() == [1] and drawn.valid.tolist() == [True]


def test_rows_without_any_negative_are_marked():
    drawn = sample_negatives(torch.zeros(2, 2), torch.tensor([1, 2]), torch.tensor([1, 1]))
    assert drawn.valid.tolist() == [False, True]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=7), st.integers(0, 2**16))
def test_never_the_same_id(ids, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor(ids)
    logits = 20 * torch.randn(len(ids), len(ids), generator=generator)
    drawn = sample_negatives(logits, ids, ids, generator=generator)
    same = ids[drawn.index] == ids
    assert not bool((same & drawn.valid).any())
    assert drawn.valid.tolist() == [bool((ids != i).any()) for i in ids]
