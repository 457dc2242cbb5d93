"""PILL's learning-rate schedule (its released training code)."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mmadapt.train.errors import RecipeError


def pill_lr(t: float, *, lr: float, warmup: float, epochs: float, min_lr: float = 0.0) -> float:
    """Learning rate at time `t`, all times in epochs.

    Linear from 0 during `warmup`, then half a cosine from `lr` to `min_lr` at `epochs`.
    """
    if t < warmup:
        return lr * t / warmup
    progress = min((t - warmup) / (epochs - warmup), 1.0) if epochs > warmup else 1.0
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def pill_schedule(
    optimizer: Optimizer,
    *,
    epochs: float,
    warmup: float,
    steps_per_epoch: int,
    accumulation: int,
    micro_batches_per_epoch: int,
) -> LambdaLR:
    """`pill_lr` for every parameter group, one call per optimizer step.

    Step k of epoch e happens at t = e + k * accumulation / micro_batches_per_epoch. The last
    factor counts the micro-batches of the loader, those of a dropped tail included, as the
    released code does; so t jumps a little at each epoch's end.
    """
    if warmup >= epochs:
        raise RecipeError(f"lr.warmup_epochs: got {warmup}, expected less than epochs={epochs}")

    def factor(step: int) -> float:
        epoch, k = divmod(step, steps_per_epoch)
        t = epoch + k * accumulation / micro_batches_per_epoch
        return pill_lr(t, lr=1.0, warmup=warmup, epochs=epochs)

    return LambdaLR(optimizer, factor)
