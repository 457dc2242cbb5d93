"""CROME's learning-rate schedules (its implementation section; LAVIS)."""

from __future__ import annotations

import math
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mmadapt.train.errors import RecipeError

Form = Literal["per_step", "per_epoch"]


def crome_lr(
    step: int, *, lr: float, start_lr: float, warmup_steps: int, total_steps: int
) -> float:
    """`per_step`: linear from `start_lr` to `lr` over `warmup_steps`, then half a cosine to 0.

    The paper: 1e-8 to 1e-5 over 1,000 steps, and 0 at `total_steps`.
    """
    if step < warmup_steps:
        return start_lr + (lr - start_lr) * step / warmup_steps
    if total_steps <= warmup_steps:
        return lr
    progress = min((step - warmup_steps) / (total_steps - warmup_steps), 1.0)
    return 0.5 * lr * (1 + math.cos(math.pi * progress))


def crome_epoch_lr(
    step: int, *, lr: float, start_lr: float, warmup_steps: int, steps_per_epoch: int, epochs: float
) -> float:
    """`per_epoch`, LAVIS's own form: warm-up inside epoch 0, then `lr` for the rest of it.

    From epoch 1 on the rate is constant within an epoch: half a cosine of the epoch's number.
    """
    epoch = step // steps_per_epoch
    if epoch == 0:
        return min(lr, start_lr + (lr - start_lr) * step / max(warmup_steps, 1))
    return 0.5 * lr * (1 + math.cos(math.pi * min(epoch / epochs, 1.0)))


def crome_schedule(
    optimizer: Optimizer,
    form: Form,
    *,
    start_lr: float,
    warmup_steps: int,
    total_steps: int,
    steps_per_epoch: int,
) -> LambdaLR:
    """One of the two for every parameter group, each with its own peak, one call per step.

    Raises:
        RecipeError: the warm-up is as long as the training, or (per epoch) longer than an epoch.
    """
    limit = total_steps if form == "per_step" else min(steps_per_epoch, total_steps)
    if warmup_steps >= limit:
        raise RecipeError(f"lr.warmup_steps: got {warmup_steps}, expected less than {limit} steps")

    def factor(peak: float):
        def at(step: int) -> float:
            options = {"lr": peak, "start_lr": min(start_lr, peak), "warmup_steps": warmup_steps}
            if form == "per_step":
                return crome_lr(step, total_steps=total_steps, **options) / peak
            epochs = total_steps / steps_per_epoch
            options |= {"steps_per_epoch": steps_per_epoch, "epochs": epochs}
            return crome_epoch_lr(step, **options) / peak

        return at

    return LambdaLR(optimizer, [factor(group["lr"]) for group in optimizer.param_groups])
