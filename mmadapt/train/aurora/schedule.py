"""The released learning rate: set once per epoch on half a cosine."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def epoch_cosine(epoch: int, *, epochs: float, lr: float, min_lr: float = 0.0) -> float:
    """`min_lr + (lr - min_lr) * (1 + cos(pi * epoch / epochs)) / 2` for epoch 0, 1, ..."""
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def epoch_cosine_schedule(optimizer: Optimizer, *, epochs: float, steps_per_epoch: int) -> LambdaLR:
    """`epoch_cosine` down to 0 for every parameter group, constant within an epoch."""

    def factor(step: int) -> float:
        return epoch_cosine(step // steps_per_epoch, epochs=epochs, lr=1.0)

    return LambdaLR(optimizer, factor)
