"""Order of the training data as a function of seed and epoch alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from mmadapt.train.errors import RecipeError


class EpochSampler(Sampler[int]):
    """A permutation of `range(length)` per epoch, cut to a whole number of optimizer steps.

    It draws from its own generator: no global random state, process count or earlier stage
    changes the order, so a resumed run sees what the uninterrupted one would have seen.

    Args:
        length: samples in the data set.
        seed: with the epoch it fixes the order.
        multiple: samples of one optimizer step over all processes; the tail that does not fill
            a step is left out (PILL drops it too). 1 keeps everything.
    """

    def __init__(self, length: int, *, seed: int, multiple: int = 1) -> None:
        if length < multiple:
            raise RecipeError(
                f"training data: got {length} samples, expected at least {multiple}, the samples "
                "of one optimizer step (per-device batch x accumulation x processes)"
            )
        self.length = length
        self.seed = seed
        self.epoch = 0
        self._kept = length // multiple * multiple

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator()
        generator.manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        yield from torch.randperm(self.length, generator=generator)[: self._kept].tolist()

    def __len__(self) -> int:
        return self._kept
