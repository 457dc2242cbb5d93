"""CROME's image preprocessing with PIL and numpy (its section on implementation; LAVIS)."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmadapt.models import IMAGE_STATISTICS

Box = tuple[int, int, int, int]
_RATIO = (3 / 4, 4 / 3)
_TRIES = 10


class CromeImageProcessor:
    """PIL images to normalised squares: bicubic, for training with a random crop and flip.

    Evaluation resizes directly, without a crop and without keeping the aspect. Training takes a
    random part of the image (area `scale`, aspect 3/4 to 4/3) and flips every second one. A flip
    makes left right: switch it off for data that asks about sides, or about writing.

    The draws are a function of `seed`, the epoch (`set_epoch`) and the image's `key`, so that a
    resumed run, any number of loader workers and every rank see the same pixels.

    Args:
        size: side of the output in pixels.
        train: whether to crop and flip at random.
        crop, flip: either can be left out of training.
        scale: range of the cropped part of the area.
        mean, std: per channel, for pixels in 0..1; CLIP's by default.
        seed: of the draws.
    """

    def __init__(
        self,
        size: int = 224,
        *,
        train: bool = False,
        crop: bool = True,
        flip: bool = True,
        scale: tuple[float, float] = (0.5, 1.0),
        mean: Sequence[float] = IMAGE_STATISTICS["clip"][0],
        std: Sequence[float] = IMAGE_STATISTICS["clip"][1],
        seed: int = 0,
    ) -> None:
        if size < 1:
            raise ValueError(f"size: expected at least 1, got {size}")
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale: expected 0 < low <= high <= 1, got {scale}")
        self.size, self.scale, self.seed, self.epoch = size, scale, seed, 0
        self.crop, self.flip = train and crop, train and flip
        self.image_mean, self.image_std = list(mean), list(std)

    @property
    def is_random(self) -> bool:
        """Whether an image looks different in another epoch."""
        return self.crop or self.flip

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __call__(
        self,
        images: Image.Image | Sequence[Image.Image],
        return_tensors: str = "pt",
        key: str = "",
        **ignored: Any,
    ) -> dict[str, Tensor]:
        """``{"pixel_values": [n, 3, size, size]}`` float32, as image processors of HF return it."""
        if return_tensors != "pt":
            raise ValueError(f"return_tensors: only 'pt' is made, got {return_tensors!r}")
        images = [images] if isinstance(images, Image.Image) else list(images)
        made = [self._process(image, f"{key}/{i}") for i, image in enumerate(images)]
        return {"pixel_values": torch.stack(made)}

    def _process(self, image: Image.Image, key: str) -> Tensor:
        draw = random.Random(f"{self.seed}/{self.epoch}/{key}")
        box = crop_box(image.size, self.scale, draw) if self.crop else None
        size = (self.size, self.size)
        image = image.convert("RGB").resize(size, Image.Resampling.BICUBIC, box=box)
        if self.flip and draw.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)
        return normalise(pixels, self.image_mean, self.image_std)


def crop_box(size: tuple[int, int], scale: tuple[float, float], draw: random.Random) -> Box:
    """A random part (left, top, right, bottom): area uniform in `scale`, aspect log-uniform.

    After ten shapes that do not fit it is the largest centred part with an aspect in range.
    """
    width, height = size
    for _ in range(_TRIES):
        area = width * height * draw.uniform(*scale)
        aspect = math.exp(draw.uniform(*map(math.log, _RATIO)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = draw.randint(0, width - w), draw.randint(0, height - h)
            return left, top, left + w, top + h
    aspect = min(max(width / height, _RATIO[0]), _RATIO[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def normalise(
    pixels: Tensor,
    mean: Sequence[float] = IMAGE_STATISTICS["clip"][0],
    std: Sequence[float] = IMAGE_STATISTICS["clip"][1],
) -> Tensor:
    """``(pixels - mean) / std`` per channel, of ``[..., 3, H, W]`` in 0..1."""
    centre, spread = (pixels.new_tensor(v)[:, None, None] for v in (mean, std))
    return (pixels - centre) / spread
