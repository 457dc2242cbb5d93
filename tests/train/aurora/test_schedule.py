"""The released learning rate and optimizer."""

import math

import pytest
import torch

from mmadapt.train.aurora.schedule import epoch_cosine, epoch_cosine_schedule


def test_rates_of_flickr():
    rates = [epoch_cosine(e, epochs=4, lr=1e-4) for e in range(4)]
    expected = [1e-4 * (1 + math.cos(math.pi * e / 4)) / 2 for e in range(4)]
    assert all(abs(a - b) <= 1e-12 for a, b in zip(rates, expected, strict=True))
    assert rates == pytest.approx([1e-4, 8.54e-5, 5e-5, 1.46e-5], rel=4e-3)


def test_a_rate_holds_for_an_epoch():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
    schedule = epoch_cosine_schedule(optimizer, epochs=4, steps_per_epoch=3)
    seen = []
    for _ in range(12):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    for step, rate in enumerate(seen):
        assert abs(rate - epoch_cosine(step // 3, epochs=4, lr=1e-4)) <= 1e-12


def test_minimum_rate():
    assert epoch_cosine(4, epochs=4, lr=1.0, min_lr=0.1) == pytest.approx(0.1)
