"""PILL's schedule: the reference values of the released run, and as a torch scheduler."""

import pytest
import torch

from mmadapt.train import pill_lr, pill_schedule

# ScienceQA: 20 epochs, 1 of warm-up, 3181 micro-batches of 4 per epoch, accumulation 8
SQA = {"lr": 2.5e-4, "warmup": 1.0, "epochs": 20.0}


@pytest.mark.parametrize(
    ("t", "expected"),
    [
        (0.0, "0.00000e+00"),
        (80 / 3181, "6.28733e-06"),
        (1.0, "2.50000e-04"),
        (2.0, "2.48295e-04"),
        (10.0, "1.35322e-04"),
        (20.0, "0.00000e+00"),
    ],
)
def test_reference_values_to_six_digits(t, expected):
    assert f"{pill_lr(t, **SQA):.5e}" == expected


def test_minimum_is_where_the_cosine_ends():
    assert pill_lr(3.0, lr=1.0, warmup=1.0, epochs=3.0, min_lr=0.25) == pytest.approx(0.25)
    assert pill_lr(1.0, lr=1.0, warmup=1.0, epochs=3.0, min_lr=0.25) == pytest.approx(1.0)
    assert pill_lr(2.0, lr=1.0, warmup=1.0, epochs=3.0, min_lr=0.0) == pytest.approx(0.5)


def rates(steps, **schedule):
    optimizer = torch.optim.SGD(
        [
            {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 2.5e-4},
            {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1e-3},
        ]
    )
    scheduler = pill_schedule(optimizer, **schedule)
    seen = []
    for _ in range(steps):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return seen


def test_scheduler_follows_the_released_micro_step_times():
    sqa = {"epochs": 20, "warmup": 1, "steps_per_epoch": 397, "accumulation": 8}
    seen = rates(800, **sqa, micro_batches_per_epoch=3181)
    assert seen[0] == [0.0, 0.0]
    assert seen[10][0] == pytest.approx(pill_lr(80 / 3181, **SQA))
    # the last step of an epoch stands 8 micro-batches before the next plus the 5 dropped ones
    assert seen[396][0] == pytest.approx(pill_lr(396 * 8 / 3181, **SQA))
    assert seen[397][0] == pytest.approx(pill_lr(1.0, **SQA))
    assert seen[794][0] == pytest.approx(pill_lr(2.0, **SQA))
    for first, second in seen:
        assert second == pytest.approx(4 * first)


def test_warmup_must_end_before_the_run():
    with pytest.raises(ValueError, match=r"lr\.warmup_epochs: got 2"):
        rates(1, epochs=2, warmup=2, steps_per_epoch=1, accumulation=1, micro_batches_per_epoch=1)
