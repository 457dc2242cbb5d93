"""Momentum weights: copies for what trains, the closed form for the rest."""

import pytest
import torch
from torch import nn

from mmadapt.models.aurora import MomentumWeights


def rel(a, b):
    return float((a - b).norm() / b.norm())


@pytest.fixture
def weights():
    torch.manual_seed(0)
    return {
        "trained.w": nn.Parameter(torch.randn(5, 3)),
        "frozen.w": nn.Parameter(torch.randn(4), requires_grad=False),
        "frozen.same": nn.Parameter(torch.randn(4), requires_grad=False),
    }


def test_hundred_steps_follow_the_loop(weights):
    start = {name: torch.randn_like(p) for name, p in weights.items() if name != "frozen.same"}
    averaged = MomentumWeights(weights, momentum=0.995, initial=start)
    loop = {name: start.get(name, p.detach()).double().clone() for name, p in weights.items()}
    for _ in range(100):
        with torch.no_grad():
            weights["trained.w"].add_(torch.randn(5, 3), alpha=0.1)
        averaged.update()
        for name, p in weights.items():
            loop[name] = 0.995 * loop[name] + 0.005 * p.detach().double()
    for name in weights:
        assert rel(averaged.value(name).double(), loop[name]) < 1e-6, name


def test_a_frozen_weight_that_starts_as_its_average_costs_nothing(weights):
    averaged = MomentumWeights(weights)
    assert averaged.stored() == 15
    averaged.update()
    assert averaged.value("frozen.w").data_ptr() == weights["frozen.w"].data_ptr()


def test_in_place_swaps_and_restores(weights):
    averaged = MomentumWeights(weights, initial={"frozen.w": torch.zeros(4)})
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in weights.items()}
    with torch.no_grad():
        weights["trained.w"].add_(1)
    averaged.update()
    with averaged.in_place():
        # after one step the frozen weight's average is 0.005 of the way from 0 to the weight
        expected = 0.005 * before["frozen.w"][1]
        torch.testing.assert_close(weights["frozen.w"].data, expected)
        assert torch.equal(weights["trained.w"].data, averaged.value("trained.w"))
    for name, p in weights.items():
        assert p.data_ptr() == before[name][0]
    assert torch.equal(weights["trained.w"].data, before["trained.w"][1] + 1)


def test_state_survives_saving(weights):
    averaged = MomentumWeights(weights, initial={"frozen.w": torch.zeros(4)})
    for _ in range(3):
        with torch.no_grad():
            weights["trained.w"].add_(1)
        averaged.update()
    fresh = MomentumWeights(weights, initial={"frozen.w": torch.zeros(4)})
    fresh.load_state_dict(averaged.state_dict())
    for name in weights:
        assert torch.equal(fresh.value(name), averaged.value(name))


def test_bad_input_is_named(weights):
    with pytest.raises(ValueError, match=r"momentum: .* 1\.5"):
        MomentumWeights(weights, momentum=1.5)
    with pytest.raises(ValueError, match="'other' names no parameter"):
        MomentumWeights(weights, initial={"other": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"frozen\.w.*expected \[4\], got \[2\]"):
        MomentumWeights(weights, initial={"frozen.w": torch.zeros(2)})
