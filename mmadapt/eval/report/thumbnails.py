"""Question images for the gallery: small PNGs, whatever format the data set uses."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, UnidentifiedImageError

_LARGEST = 256  # pixels; a page with a dozen photographs stays below a few megabytes


def thumbnail(path: str | Path) -> bytes:
    """The image as PNG with no side above 256 pixels; small scans keep every pixel.

    Raises:
        ValueError: the file is missing or no image, with its path.
    """
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"sample image {path}: cannot be read ({error})") from error
    picture.thumbnail((_LARGEST, _LARGEST))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
