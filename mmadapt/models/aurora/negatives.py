"""Hard negatives: drawn in proportion to similarity, never from the same image."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Negatives(NamedTuple):
    """`index` [B]: a candidate for every row. `valid` [B] bool: false where none exists."""

    index: Tensor
    valid: Tensor


@torch.no_grad()
def sample_negatives(
    logits: Tensor,
    ids: Tensor,
    candidate_ids: Tensor,
    *,
    generator: torch.Generator | None = None,
) -> Negatives:
    """One negative for every row, with probability softmax(logits) among other ids.

    `logits` [B, N]: similarities divided by the temperature; `ids` [B], `candidate_ids` [N]. One
    draw for the whole batch, without a host synchronisation. Candidates of the row's own id are
    taken out before the softmax, so the others keep their proportions however small their
    weights are. A row whose candidates all share its id has no negative: its index is
    arbitrary and `valid` says so.
    """
    same = ids[:, None] == candidate_ids
    valid = ~same.all(1)
    barred = same & valid[:, None]  # a row without a negative draws from all: multinomial must
    weights = logits.float().masked_fill(barred, -torch.inf).softmax(1)
    return Negatives(torch.multinomial(weights, 1, generator=generator).squeeze(1), valid)
