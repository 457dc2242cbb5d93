"""Row subsets: run part of a computation on the rows that an expert or a mask selects.

On the CPU rows are gathered, so work grows with their number. On other devices the number of rows
is unknown to the host and reading it would wait for the device (and break graph capture), so all
rows are computed and the others are blanked.
"""

import torch
from torch import Tensor


def _gathers(selected: Tensor) -> bool:
    return selected.device.type == "cpu"


class Rows:
    """The rows of a [T, ...] tensor where `selected` ([T] bool) holds; None selects all."""

    def __init__(self, selected: Tensor | None):
        self._selected = selected
        gathers = selected is not None and _gathers(selected)
        self._index = selected.nonzero().squeeze(1) if gathers else None

    def take(self, source: Tensor) -> Tensor:
        """The selected rows; off the CPU all rows, those not selected being zero."""
        if self._selected is None:
            return source
        if self._index is not None:
            return source.index_select(0, self._index)
        return torch.where(self._like(source), source, 0.0)

    def put(self, target: Tensor, rows: Tensor) -> None:
        """Write what was computed from `take`d rows back into `target`, in place."""
        rows = rows.to(target.dtype)
        if self._selected is None:
            target.copy_(rows)
        elif self._index is not None:
            target.index_copy_(0, self._index, rows)
        else:
            target.copy_(torch.where(self._like(rows), rows, target))

    def _like(self, tensor: Tensor) -> Tensor:
        return self._selected.view(-1, *[1] * (tensor.ndim - 1))
