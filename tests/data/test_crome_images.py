"""CROME's preprocessing: statistics, bicubic resize, random crop and flip."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from mmadapt.data import CromeImageProcessor
from mmadapt.data.crome_images import crop_box, normalise

BLACK = (-1.792263, -1.752097, -1.480220)
WHITE = (1.930336, 2.074884, 2.145897)
GREY = (0.069037, 0.161393, 0.332839)


def gradient(width=60, height=40):
    x = np.linspace(0, 255, width)[None, :].repeat(height, 0)
    y = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    return Image.fromarray(np.stack([x, y, (x + y) / 2], -1).astype(np.uint8))


@pytest.mark.parametrize(("value", "expected"), [(0.0, BLACK), (1.0, WHITE), (0.5, GREY)])
def test_statistics(value, expected):
    pixels = normalise(torch.full((3, 2, 2), value))
    torch.testing.assert_close(pixels[:, 0, 0], torch.tensor(expected), atol=1e-6, rtol=0)
    if value != 0.5:
        image = Image.new("RGB", (7, 5), (int(255 * value),) * 3)
        found = CromeImageProcessor(4)(image)["pixel_values"]
        torch.testing.assert_close(found[0, :, 1, 2], torch.tensor(expected), atol=1e-6, rtol=0)


def test_evaluation_resizes_directly():
    image = gradient()
    found = CromeImageProcessor(16)(images=[image, image], return_tensors="pt")["pixel_values"]
    small = image.resize((16, 16), Image.Resampling.BICUBIC)
    expected = normalise(torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255)
    assert found.shape == (2, 3, 16, 16)
    torch.testing.assert_close(found[1], expected)


@pytest.mark.parametrize("size", [(60, 40), (40, 60), (500, 3), (3, 500), (1, 1)])
def test_crops(size):
    draw = random.Random(0)
    for _ in range(200):
        left, top, right, bottom = crop_box(size, (0.5, 1.0), draw)
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
        if max(size) < 100 and min(size) > 1:
            assert 0.45 < (right - left) * (bottom - top) / (size[0] * size[1]) <= 1
            assert 0.7 < (right - left) / (bottom - top) < 1.4


def test_training_draws_depend_on_seed_epoch_and_key():
    image = gradient()

    def pixels(key, seed=0, epoch=0, **options):
        processor = CromeImageProcessor(12, train=True, seed=seed, **options)
        processor.set_epoch(epoch)
        return processor(image, key=key)["pixel_values"]

    one = pixels("a")
    assert torch.equal(one, pixels("a"))
    for other in (pixels("b"), pixels("a", seed=1), pixels("a", epoch=1)):
        assert not torch.equal(one, other)


def test_flip_can_be_switched_off():
    """Without a crop, half of the images are mirrored, and none with `flip=False`."""
    image = gradient()
    plain = CromeImageProcessor(12)(image)["pixel_values"]
    for flip, low, high in ((True, 30, 70), (False, 0, 0)):
        processor = CromeImageProcessor(12, train=True, crop=False, flip=flip)
        assert processor.is_random == flip
        made = [processor(image, key=str(k))["pixel_values"] for k in range(100)]
        mirrored = [torch.allclose(m.flip(-1), plain, atol=0.03) for m in made]
        straight = [torch.equal(m, plain) for m in made]
        assert low <= sum(mirrored) <= high
        assert all(a or b for a, b in zip(mirrored, straight, strict=True))


def test_statistics_of_another_encoder():
    processor = CromeImageProcessor(4, mean=(0, 0, 0), std=(1, 1, 1))
    assert torch.equal(processor(Image.new("RGB", (4, 4)))["pixel_values"], torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CromeImageProcessor(0), "size: expected at least 1, got 0"),
        (lambda: CromeImageProcessor(scale=(0, 1)), "scale: expected 0 < low"),
        (lambda: CromeImageProcessor(4)(gradient(), return_tensors="np"), "only 'pt' is made"),
    ],
)
def test_wrong_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
