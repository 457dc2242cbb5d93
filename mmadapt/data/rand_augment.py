"""RandAugment as BLIP and Aurora train with it: ten operations on PIL images.

N operations are drawn for every image and each is applied with probability 0.5 at magnitude M of
10. Geometric operations fill with grey. Draws come from torch's global generator, which the
trainer seeds, saves and restores.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image, ImageEnhance, ImageOps

MAX_MAGNITUDE = 10
_FILL = (128, 128, 128)
_TRANSLATE = 10.0  # pixels at the largest magnitude
_SHEAR = 0.3
_ROTATE = 30.0  # degrees
Operation = Callable[[Image.Image, float], Image.Image]


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=_FILL
    )


def _enhance(kind: type) -> Operation:
    # factor 1 is the image itself; magnitude 5 of 10 gives exactly 1
    return lambda image, level: kind(image).enhance(level * 1.8 + 0.1)


def _sign() -> float:
    return 1.0 if torch.rand(()) < 0.5 else -1.0


OPERATIONS: dict[str, Operation] = {
    "Identity": lambda image, level: image,
    "AutoContrast": lambda image, level: ImageOps.autocontrast(image),
    "Brightness": _enhance(ImageEnhance.Brightness),
    "Sharpness": _enhance(ImageEnhance.Sharpness),
    "Equalize": lambda image, level: ImageOps.equalize(image),
    "ShearX": lambda image, level: _affine(image, (1, _sign() * level * _SHEAR, 0, 0, 1, 0)),
    "ShearY": lambda image, level: _affine(image, (1, 0, 0, _sign() * level * _SHEAR, 1, 0)),
    "TranslateX": lambda image, level: _affine(
        image, (1, 0, _sign() * level * _TRANSLATE, 0, 1, 0)
    ),
    "TranslateY": lambda image, level: _affine(
        image, (1, 0, 0, 0, 1, _sign() * level * _TRANSLATE)
    ),
    "Rotate": lambda image, level: image.rotate(
        _sign() * level * _ROTATE, Image.Resampling.BILINEAR, fillcolor=_FILL
    ),
}
"""Name -> operation on an RGB image at a level between 0 and 1."""


class RandAugment:
    """`count` operations (N) at `magnitude` (M), each applied with `probability`."""

    def __init__(
        self,
        count: int = 2,
        magnitude: int = 5,
        *,
        operations: tuple[str, ...] = tuple(OPERATIONS),
        probability: float = 0.5,
    ) -> None:
        unknown = [name for name in operations if name not in OPERATIONS]
        if unknown or not operations:
            raise ValueError(f"operations: expected some of {list(OPERATIONS)}, got {operations}")
        if not 0 <= magnitude <= MAX_MAGNITUDE:
            raise ValueError(f"magnitude: expected 0..{MAX_MAGNITUDE}, got {magnitude}")
        self.count, self.probability = count, probability
        self.level = magnitude / MAX_MAGNITUDE
        self.operations = operations

    def __call__(self, image: Image.Image) -> Image.Image:
        for index in torch.randint(len(self.operations), (self.count,)).tolist():
            if torch.rand(()) < self.probability:
                image = OPERATIONS[self.operations[index]](image, self.level)
        return image
