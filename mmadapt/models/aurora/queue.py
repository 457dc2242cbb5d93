"""The queue of past momentum features that contrastive learning takes its candidates from."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from mmadapt.models.aurora.gather import gather

NO_ID = -100


class FeatureQueue(nn.Module):
    """The newest `size` pairs of momentum features `[size, dim]` with their image ids `[size]`.

    A fresh queue holds random unit vectors under the id -100, which no image has. `enqueue` takes
    in the rows of all ranks, in rank order, and overwrites the oldest ones. They are written
    when the queue is used next and not at once: the step's logits need the old rows until its
    backward has run, and so the queue is never cloned.

    Source: BLIP (Li et al. 2022), section 4.1 there; queue size 57,600.
    """

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"size: expected at least 1, got {size}")
        self.size = size
        self.register_buffer("image", normalize(torch.randn(size, dim), dim=-1))
        self.register_buffer("text", normalize(torch.randn(size, dim), dim=-1))
        self.register_buffer("ids", torch.full((size,), NO_ID, dtype=torch.int64))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self._position: int | None = 0
        self._pending: tuple[Tensor, Tensor, Tensor] | None = None
        self.register_state_dict_pre_hook(lambda module, *_: module.flush())

    @torch.no_grad()
    def enqueue(self, image: Tensor, text: Tensor, ids: Tensor) -> None:
        """Take in momentum features `[B, dim]` and image ids `[B]` of this and all other ranks.

        Raises:
            ValueError: the rows of all ranks do not divide the queue.
        """
        self.flush()
        image, text, ids = gather(image), gather(text), gather(ids)
        if self.size % len(ids):
            raise ValueError(
                f"queue_size: {self.size} is no multiple of the batch of all ranks, {len(ids)}"
            )
        self._pending = (image, text, ids)

    @torch.no_grad()
    def flush(self) -> None:
        """Write the rows that were enqueued last."""
        if self._pending is None:
            return
        if self._position is None:
            self._position = int(self.pointer)  # after loading a state
        image, text, ids = self._pending
        rows = slice(self._position, self._position + len(ids))
        self.image[rows], self.text[rows], self.ids[rows] = image, text, ids
        self._position = (self._position + len(ids)) % self.size
        self.pointer.fill_(self._position)
        self._pending = None

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._pending, self._position = None, None

    def load_released(self, image_queue: Tensor, text_queue: Tensor) -> None:
        """Start from a BLIP checkpoint's queues `[dim, size]`; ids and pointer start afresh.

        Raises:
            ValueError: other shapes. The released loader leaves the random rows in that case.
        """
        for name, given in (("image_queue", image_queue), ("text_queue", text_queue)):
            if given.T.shape != self.image.shape:
                raise ValueError(
                    f"{name}: expected [{self.image.shape[1]}, {self.size}], "
                    f"got {list(given.shape)}"
                )
        self.image.copy_(image_queue.T)
        self.text.copy_(text_queue.T)
        self.ids.fill_(NO_ID)
        self.pointer.zero_()
        self._position, self._pending = 0, None
