"""Decoding images, and a bounded cache of their pixel values for training over many epochs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmadapt.data.errors import DataError
from mmadapt.data.sample import Sample


def open_image(path: str, record: object = None) -> Image.Image:
    """The decoded image as RGB; DataError names the file and the record it belongs to."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise DataError.at(path, record, "image is missing") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError.at(path, record, f"image is corrupt ({error})") from error


def find_problems(samples: Sequence[Sample], records: Iterable[object]) -> list[str]:
    """Fetch every sample and decode its images; what is wrong. `records` name them in order."""
    problems = []
    for index, record in enumerate(records):
        try:
            for path in samples[index].image_paths():
                open_image(path, record)
        except DataError as error:
            problems.append(str(error))
    return problems


class PixelLoader:
    """Path -> pixel values [3, H, W] through an HF image processor, the newest kept in memory.

    `cache_bytes` bounds the memory of the kept tensors; the longest unused goes first.
    """

    def __init__(self, image_processor: Callable[..., Any], cache_bytes: int = 256 * 2**20):
        self.image_processor = image_processor
        self.cache_bytes = cache_bytes
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        self._used = 0
        self._zero: Tensor | None = None

    def __call__(self, path: str, record: object = None) -> Tensor:
        if path in self._cache:
            self._cache.move_to_end(path)
            return self._cache[path]
        pixels = self._process(open_image(path, record))
        self._cache[path] = pixels
        self._used += pixels.nbytes
        while self._used > self.cache_bytes:
            _, oldest = self._cache.popitem(last=False)
            self._used -= oldest.nbytes
        return pixels

    def zero(self) -> Tensor:
        """Zeros in the shape of an image: what a batch without images carries (PILL)."""
        if self._zero is None:
            self._zero = torch.zeros_like(self._process(Image.new("RGB", (32, 32))))
        return self._zero

    def _process(self, image: Image.Image) -> Tensor:
        pixels = self.image_processor(images=[image], return_tensors="pt")["pixel_values"]
        if pixels.ndim != 4 or pixels.shape[0] != 1:
            raise ValueError(
                "image_processor: expected pixel_values [1, 3, H, W] for one image, "
                f"got {list(pixels.shape)}"
            )
        return pixels[0]
