"""PILL's augmentation: now and then the target names another choice's letter."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal, get_args

Variant = Literal["uniform_all", "strictly_wrong"]


@dataclass(frozen=True)
class WrongAnswers:
    """With probability `rate` the answer is redrawn.

    `uniform_all` draws from all choices, the right one included (the paper's p = 0.1: the
    letter changes at rate p (n - 1) / n); `strictly_wrong` draws from the wrong ones.
    A draw depends on (seed, epoch, index) alone, so a resumed run sees the same letters.
    """

    rate: float = 0.0
    variant: Variant = "uniform_all"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise ValueError(f"wrong_answer_rate: expected 0..1, got {self.rate}")
        if self.variant not in get_args(Variant):
            raise ValueError(
                f"wrong_answers: expected one of {get_args(Variant)}, got {self.variant!r}"
            )

    def draw(self, answer: int, num_choices: int, *, epoch: int, index: int) -> int:
        """The index of the choice to train on; `answer` is the true one."""
        if self.rate == 0:
            return answer
        rng = random.Random(f"{self.seed}/{epoch}/{index}")
        if rng.random() >= self.rate:
            return answer
        if self.variant == "uniform_all":
            return rng.randrange(num_choices)
        return (answer + 1 + rng.randrange(num_choices - 1)) % num_choices
