"""Mixing data sets of very different sizes: draw each in proportion to a root of its size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

_BLOCK = 4096


def balanced_probabilities(
    sizes: Sequence[int], *, power: float = 0.5, weights: Sequence[float] | None = None
) -> list[float]:
    """``p_d = w_d N_d^power / sum_i w_i N_i^power``; power 1/2 is InstructBLIP's rule, as CROME's.

    Args:
        sizes: samples of each data set.
        power: 0 draws all sets alike, 1 in proportion to their size.
        weights: factors by hand on top; ones by default.
    """
    weights = [1.0] * len(sizes) if weights is None else list(weights)
    if not sizes or min(sizes) < 1:
        raise ValueError(f"sizes: expected data sets of at least one sample, got {list(sizes)}")
    if len(weights) != len(sizes) or min(weights) < 0 or sum(weights) <= 0:
        raise ValueError(f"weights: expected {len(sizes)} numbers, none negative, got {weights}")
    shares = [w * n**power for w, n in zip(weights, sizes, strict=True)]
    return [share / sum(shares) for share in shares]


class BalancedSampler(Sampler[int]):
    """Draws a data set by `balanced_probabilities`, then a sample of it uniformly, with repetition.

    Yields indices into the sets laid end to end (`mmadapt.data.Mixture`, `ConcatDataset`). The
    draws are a function of seed, epoch and position alone: every rank that makes this sampler has
    the same stream (accelerate shards its batches), and a `state_dict` is a few numbers. Iterating
    goes on from where `load_state_dict` left it, once, and from the start of the epoch afterwards.

    Args:
        sizes: samples of each data set.
        num_samples: draws of an epoch; the sum of the sizes by default.
        seed: with the epoch it fixes the draws.
        batch: draw the data set once for so many samples in a row; 1 draws it for every sample.
        power, weights: see `balanced_probabilities`.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        num_samples: int | None = None,
        seed: int = 0,
        batch: int = 1,
        power: float = 0.5,
        weights: Sequence[float] | None = None,
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch: expected at least 1, got {batch}")
        self.sizes = list(sizes)
        self.probabilities = balanced_probabilities(sizes, power=power, weights=weights)
        self.num_samples = sum(self.sizes) if num_samples is None else num_samples
        if self.num_samples < 1:
            raise ValueError(f"num_samples: expected at least 1, got {num_samples}")
        self.seed, self.batch, self.epoch = seed, batch, 0
        self._drawn = self._resume_at = 0

    def set_epoch(self, epoch: int) -> None:
        """Begin epoch `epoch`; a position restored for that very epoch is kept."""
        if epoch != self.epoch:
            self.epoch, self._drawn, self._resume_at = epoch, 0, 0

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        start, self._resume_at = self._resume_at, 0
        self._drawn = start
        while self._drawn < self.num_samples:
            block, inner = divmod(self._drawn, _BLOCK * self.batch)
            _, indices = self.draw_block(block)
            stop = min(len(indices), inner + self.num_samples - self._drawn)
            for index in indices[inner:stop].tolist():
                self._drawn += 1
                yield index

    def draw_block(self, block: int) -> tuple[Tensor, Tensor]:
        """Data set and index of the draws of one block of this epoch, int64 ``[4096 * batch]``."""
        generator = torch.Generator()
        generator.manual_seed(hash((self.seed, self.epoch, block)) % 2**63)
        shares = torch.tensor(self.probabilities, dtype=torch.float64)
        sets = torch.multinomial(shares, _BLOCK, replacement=True, generator=generator)
        sets = sets.repeat_interleave(self.batch)
        sizes = torch.tensor(self.sizes, dtype=torch.float64)[sets]
        uniform = torch.rand(len(sets), dtype=torch.float64, generator=generator)
        inside = (uniform * sizes).long()  # at most size - 1: uniform < 1 and sizes < 2^53
        starts = torch.tensor([0, *self.sizes]).cumsum(0)[sets]
        return sets, starts + inside

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, after the samples that were taken from it."""
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "drawn": self._drawn,
            "sizes": self.sizes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict` of a sampler over the same data with the same seed."""
        for name in ("seed", "sizes"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"the state was saved with {name}={state[name]}, this sampler has "
                    f"{getattr(self, name)}"
                )
        self.epoch = state["epoch"]
        self._drawn = self._resume_at = state["drawn"]
