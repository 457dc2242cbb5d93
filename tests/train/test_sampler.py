"""The order of the data depends on seed and epoch, and epochs are whole steps."""

import pytest
import torch

from mmadapt.train.sampler import EpochSampler


def order(epoch, **options):
    sampler = EpochSampler(23, **options)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_a_permutation_cut_to_whole_steps():
    sampler = EpochSampler(23, seed=0, multiple=4)
    indices = list(sampler)
    assert len(sampler) == len(indices) == 20
    assert len(set(indices)) == 20
    assert set(indices) <= set(range(23))
    assert sorted(order(0, seed=0)) == list(range(23))


def test_order_is_a_function_of_seed_and_epoch_alone():
    first = order(1, seed=3)
    torch.manual_seed(99)
    torch.rand(5)
    assert order(1, seed=3) == first
    assert order(2, seed=3) != first
    assert order(1, seed=4) != first


def test_iterating_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    order(0, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_scienceqa_drops_five_micro_batches():
    # 12,726 samples in micro-batches of 4: 3181, of which 397 x 8 are used in PILL
    sampler = EpochSampler(12_726, seed=0, multiple=32)
    assert len(sampler) // 32 == 397
    assert 12_726 // 4 - len(sampler) // 4 == 5


def test_too_few_samples_for_one_step():
    with pytest.raises(ValueError, match="got 3 samples, expected at least 8"):
        EpochSampler(3, seed=0, multiple=8)
