"""BLIP's image transforms with PIL and numpy: random crop, flip, RandAugment, CLIP statistics."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmadapt.data.rand_augment import RandAugment

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def to_pixels(
    image: Image.Image,
    mean: tuple[float, ...] | None = CLIP_MEAN,
    std: tuple[float, ...] | None = CLIP_STD,
) -> Tensor:
    """`[3, H, W]` fp32: channels / 255, normalised unless mean is None."""
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
    if mean is None or std is None:
        return pixels
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def random_resized_crop(
    image: Image.Image,
    size: int,
    scale: tuple[float, float] = (0.5, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Image.Image:
    """A random part of `scale` of the area, resized (bicubic) to a square of `size`.

    Ten tries at a log-uniform aspect ratio; then the largest centred part of a ratio in range.
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * _uniform(*scale)
        aspect = math.exp(_uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left = int(torch.randint(width - w + 1, ()))
            top = int(torch.randint(height - h + 1, ()))
            break
    else:
        aspect = min(max(width / height, ratio[0]), ratio[1])
        w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
        left, top = (width - w) // 2, (height - h) // 2
    box = (left, top, left + w, top + h)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


class TrainTransform:
    """RandomResizedCrop(size, 0.5-1.0, bicubic), flip, RandAugment(N=2, M=5), CLIP statistics.

    `scale=None` (a plain resize), `flip=False` and `augment=None` leave steps out, for images
    whose meaning they change.
    Draws come from torch's global generator.
    """

    def __init__(
        self,
        size: int,
        *,
        scale: tuple[float, float] | None = (0.5, 1.0),
        flip: bool = True,
        augment: RandAugment | None = RandAugment(),  # noqa: B008  (without state)
    ) -> None:
        self.size, self.scale, self.flip, self.augment = size, scale, flip, augment

    def __call__(self, image: Image.Image) -> Tensor:
        if self.scale is None:
            image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        else:
            image = random_resized_crop(image, self.size, self.scale)
        if self.flip and torch.rand(()) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.augment is not None:
            image = self.augment(image)
        return to_pixels(image)


class EvalTransform:
    """Bicubic resize to a square, CLIP statistics."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Tensor:
        return to_pixels(image.resize((self.size, self.size), Image.Resampling.BICUBIC))


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """Shorter side to `size`, then the centred square: DiDeMo's frames."""
    width, height = image.size
    short = min(width, height)
    shape = (round(width * size / short), round(height * size / short))
    image = image.resize(shape, Image.Resampling.BILINEAR)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))
