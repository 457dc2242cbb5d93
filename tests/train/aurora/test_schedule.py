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


def test_ten_steps_of_the_released_optimizer(tmp_path):
    """What a run's arguments make, against AdamW written out in fp64."""
    from transformers import Trainer

    from mmadapt.train.arguments import build_arguments
    from mmadapt.train.aurora.run import DEFAULTS

    arguments = build_arguments(
        DEFAULTS, output_dir=str(tmp_path), learning_rate=1e-4, seed=0, use_cpu=True
    )
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(50))
    expected = weight.detach().double().clone()
    optimizer = kind([{"params": [weight], "weight_decay": arguments.weight_decay}], **options)
    m = v = torch.zeros(50, dtype=torch.float64)
    for step in range(1, 11):
        gradient = torch.randn(50)
        weight.grad = gradient.clone()
        optimizer.step()
        g = gradient.double()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        update = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        expected = expected * (1 - 1e-4 * 0.05) - 1e-4 * update
        error = (weight.detach().double() - expected).norm() / expected.norm()
        assert error <= 1e-6
