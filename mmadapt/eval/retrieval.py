"""Recall at K and median rank in both directions, from score matrices.

Tie rule, used everywhere: a wrong candidate with the same score stands before the right one. So
nothing is found by luck, and unscored candidates (all at one low score) never count as found.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

UNSCORED = -100.0


@dataclass(frozen=True)
class RetrievalMetrics:
    """Percentages; `image_to_text` finds texts for images (or videos), and the other way round."""

    image_to_text: dict[str, float]
    text_to_image: dict[str, float]

    @property
    def mean_recall(self) -> float:
        """Mean of the six recalls."""
        means = [_mean_recall(side) for side in (self.image_to_text, self.text_to_image)]
        return sum(means) / 2

    def released(self, *, video: bool = False) -> dict[str, float]:
        """Under the names of the released evaluation (txt_r1, img_r1 or vid_r1, ..., r_mean)."""
        found = "vid" if video else "img"
        named = {}
        for prefix, side in (("txt", self.image_to_text), (found, self.text_to_image)):
            named |= {f"{prefix}_r{k}": side[f"R@{k}"] for k in (1, 5, 10)}
            named[f"{prefix}_r_mean"] = _mean_recall(side)
        if video:
            named["vid_mdR"] = self.text_to_image["MdR"]
        return named | {"r_mean": self.mean_recall}


def _mean_recall(side: dict[str, float]) -> float:
    return (side["R@1"] + side["R@5"] + side["R@10"]) / 3


def ranks(scores: Tensor, relevant: Tensor) -> Tensor:
    """`[N]` int64: position, from 0, of each row's best relevant candidate.

    `scores` [N, M]; `relevant` [N, M] bool. The position is the number of irrelevant candidates
    that score as much or more.

    Raises:
        ValueError: shapes differ, a row without a relevant candidate, a score that is not a number.
    """
    if scores.shape != relevant.shape or scores.ndim != 2:
        raise ValueError(
            f"relevant: expected the shape of scores, {list(scores.shape)}, "
            f"got {list(relevant.shape)}"
        )
    if not bool(relevant.any(1).all()):
        row = int((~relevant.any(1)).nonzero()[0])
        raise ValueError(f"relevant: row {row} has no relevant candidate")
    if bool(scores.isnan().any()):
        raise ValueError("scores: hold a NaN; the model diverged")
    best = scores.masked_fill(~relevant, -torch.inf).max(1, keepdim=True).values
    return ((scores >= best) & ~relevant).sum(1)


def recalls(positions: Tensor, at: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """`R@K`: percentage of positions below K. `MdR`: median of positions, counted from 1.

    An even count has the mean of its two middle values as median.
    """
    found = {f"R@{k}": 100 * float((positions < k).double().mean()) for k in at}
    found["MdR"] = float((positions + 1).double().quantile(0.5))
    return found


def retrieval_metrics(i2t: Tensor, t2i: Tensor, text_image: Tensor) -> RetrievalMetrics:
    """Both directions' recalls.

    `i2t` [images, texts] and `t2i` [texts, images]: scores, `UNSCORED` where there is none.
    `text_image` [texts] int64: the image of each text; an image may have several.

    Raises:
        ValueError: shapes that do not fit, an image without a text.
    """
    images, texts = i2t.shape
    if t2i.shape != (texts, images):
        raise ValueError(f"t2i: expected [{texts}, {images}], got {list(t2i.shape)}")
    if text_image.shape != (texts,):
        raise ValueError(f"text_image: expected [{texts}], got {list(text_image.shape)}")
    relevant = text_image[None, :] == torch.arange(images, device=text_image.device)[:, None]
    return RetrievalMetrics(
        image_to_text=recalls(ranks(i2t, relevant)),
        text_to_image=recalls(ranks(t2i, relevant.T)),
    )
