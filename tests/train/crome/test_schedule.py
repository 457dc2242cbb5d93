"""CROME's two learning-rate schedules."""

import math

import pytest
import torch

from mmadapt.train.crome.schedule import crome_epoch_lr, crome_lr, crome_schedule
from mmadapt.train.errors import RecipeError

PAPER = {"lr": 1e-5, "start_lr": 1e-8, "warmup_steps": 1000}


@pytest.mark.parametrize(
    ("total", "step", "expected"),
    [
        (87_207, 0, 1e-8),
        (87_207, 500, 5.005e-6),
        (87_207, 1000, 1e-5),
        (87_207, 43_603, 5.09119e-6),
        (87_207, 87_207, 0.0),
        (2_000_000, 500_000, 8.53970e-6),
        (2_000_000, 1_000_000, 5.00393e-6),
    ],
)
def test_per_step(total, step, expected):
    found = crome_lr(step, total_steps=total, **PAPER)
    assert found == pytest.approx(expected, rel=2e-6, abs=1e-15)


def test_per_epoch():
    """LAVIS: warm-up inside epoch 0, then the peak; a cosine of the epoch's number from 1 on."""
    options = {**PAPER, "steps_per_epoch": 5000, "epochs": 4}
    at = {step: crome_epoch_lr(step, **options) for step in (0, 500, 1000, 4999)}
    assert at == pytest.approx({0: 1e-8, 500: 5.005e-6, 1000: 1e-5, 4999: 1e-5})
    for epoch in (1, 2, 3):
        expected = 0.5e-5 * (1 + math.cos(math.pi * epoch / 4))
        for step in (5000 * epoch, 5000 * epoch + 4999):
            assert crome_epoch_lr(step, **options) == pytest.approx(expected)


@pytest.mark.parametrize("form", ["per_step", "per_epoch"])
def test_every_group_has_its_own_peak(form):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1e-2, 1e-3)]
    optimizer = torch.optim.AdamW(groups)
    schedule = crome_schedule(
        optimizer, form, start_lr=1e-8, warmup_steps=2, total_steps=12, steps_per_epoch=4
    )
    rates = []
    for _ in range(12):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx([1e-8, 1e-8]) and rates[2] == pytest.approx([1e-2, 1e-3])
    ends = {"per_step": 0.5 * (1 + math.cos(math.pi * 9 / 10)), "per_epoch": 0.25}
    assert rates[11] == pytest.approx([1e-2 * ends[form], 1e-3 * ends[form]])


def test_no_warmup():
    assert crome_lr(0, lr=1.0, start_lr=0.1, warmup_steps=0, total_steps=10) == 1.0


@pytest.mark.parametrize(("form", "limit"), [("per_step", 12), ("per_epoch", 4)])
def test_a_warmup_that_never_ends(form, limit):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(RecipeError, match=rf"lr\.warmup_steps: got 50, expected less than {limit}"):
        crome_schedule(
            optimizer, form, start_lr=1e-8, warmup_steps=50, total_steps=12, steps_per_epoch=4
        )
