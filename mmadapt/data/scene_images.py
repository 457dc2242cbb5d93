"""Pictures of digit scenes from scikit-learn's scans; training and test scans never mix."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

import numpy as np
from PIL import Image

from mmadapt.data.digit_scenes import Scene
from mmadapt.data.digits_vqa import SCAN_BLOCKS

CELL_SIZE = 24
SCENE_SIZE = 2 * CELL_SIZE
_SCAN_SIZE = 18  # leaves room to shift a scan within its cell


class SceneArtist:
    """Draws scenes with the scans of one split ("train", "val" or "test")."""

    def __init__(self, split: str) -> None:
        if split not in SCAN_BLOCKS:
            raise ValueError(f"split: expected one of {list(SCAN_BLOCKS)}, got {split!r}")
        labels, scans = _scans()
        self._scans: dict[int, list[np.ndarray]] = defaultdict(list)
        for index in SCAN_BLOCKS[split]:
            self._scans[labels[index]].append(scans[index])

    def draw(self, scene: Scene, rng: random.Random) -> np.ndarray:
        """`[SCENE_SIZE, SCENE_SIZE]` uint8; scans and their shifts are drawn."""
        canvas = np.zeros((SCENE_SIZE, SCENE_SIZE), np.uint8)
        for cell, digit in scene.cells:
            scan = rng.choice(self._scans[digit])
            top = cell // 2 * CELL_SIZE + rng.randint(0, CELL_SIZE - _SCAN_SIZE)
            left = cell % 2 * CELL_SIZE + rng.randint(0, CELL_SIZE - _SCAN_SIZE)
            canvas[top : top + _SCAN_SIZE, left : left + _SCAN_SIZE] = scan
        return canvas


_cache: dict[str, Any] = {}


def _scans() -> tuple[list[int], list[np.ndarray]]:
    """Labels and enlarged scans `[_SCAN_SIZE, _SCAN_SIZE]` in scikit-learn's order."""
    if not _cache:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError(
                "digit scenes are drawn from scikit-learn's scans, not installed"
            ) from error
        digits = load_digits()
        pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
        size = (_SCAN_SIZE, _SCAN_SIZE)
        images = [Image.fromarray(scan).resize(size, Image.Resampling.BILINEAR) for scan in pixels]
        _cache["labels"] = [int(label) for label in digits.target]
        _cache["scans"] = [np.asarray(image) for image in images]
    return _cache["labels"], _cache["scans"]
