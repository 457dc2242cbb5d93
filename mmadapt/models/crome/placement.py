"""Put image vectors at the placeholder positions of a batch."""

import torch
from torch import Tensor


def vector_index(image: Tensor, before: int, behind: int) -> Tensor:
    """Which image vector stands at each position: an index ``[B, S]`` into ``[images * tokens]``.

    The images of a batch are those of its rows in order; the vectors of an image are its `before`
    tokens in front of the instruction, then its `behind` tokens. A row with c images holds
    ``c * before`` placeholders for the first kind, image by image, then ``c * behind`` for the
    second. Positions without a placeholder get 0. Nothing waits for the device.

    Args:
        image: bool ``[B, S]``, the placeholders.
        before, behind: placeholders per image on either side of the instruction.
    """
    total = before + behind
    counts = image.sum(1, keepdim=True) // total
    first = counts.cumsum(0) - counts
    rank = (image.cumsum(1) - 1).clamp(min=0)
    front = rank < counts * before
    back = (rank - counts * before).clamp(min=0)
    local = torch.where(front, rank // max(before, 1), back // max(behind, 1))
    inner = torch.where(front, rank % max(before, 1), before + back % max(behind, 1))
    return ((first + local) * total + inner) * image


def place(embeds: Tensor, vectors: Tensor, image: Tensor, before: int, behind: int) -> Tensor:
    """`embeds` ``[B, S, d]`` with `vectors` ``[images, tokens, d]`` at the placeholders.

    Dense: vectors that no position refers to get zero gradients, not None.
    """
    chosen = vectors.flatten(0, 1)[vector_index(image, before, behind)]
    return torch.where(image.unsqueeze(-1), chosen.to(embeds.dtype), embeds)


def check_count(image: Tensor, images: int, per_image: int) -> None:
    """Raise ValueError unless there is a whole image for every run of placeholders.

    A batch without placeholders may carry an image that nothing refers to.
    """
    found = int(image.sum())
    rows = image.sum(1) % per_image if per_image else image.sum(1)
    if found not in (0, images * per_image) or bool(rows.any()):
        raise ValueError(
            f"input_ids: got {found} image placeholders for {images} images, expected {per_image} "
            f"for each image, all of an image in one row ({images * per_image} in all)"
        )
