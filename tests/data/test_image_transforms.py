"""BLIP's training and test transforms."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from mmadapt.data.image_transforms import (
    CLIP_MEAN,
    CLIP_STD,
    EvalTransform,
    TrainTransform,
    random_resized_crop,
    to_pixels,
)
from mmadapt.data.rand_augment import OPERATIONS, RandAugment


@pytest.fixture
def image():
    y, x = np.mgrid[0:40, 0:60]
    return Image.fromarray(np.stack([4 * x, x * y % 200, 2 * (x + y)], -1).astype(np.uint8))


def test_test_transform_is_a_bicubic_square_with_clip_statistics(image):
    pixels = EvalTransform(16)(image)
    expected = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC)) / 255
    expected = (expected - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    np.testing.assert_allclose(pixels.permute(1, 2, 0), expected, rtol=1e-5, atol=1e-6)


def test_training_draws_come_from_torch(image):
    transform = TrainTransform(16)
    torch.manual_seed(1)
    first, second = transform(image), transform(image)
    torch.manual_seed(1)
    assert torch.equal(transform(image), first) and not torch.equal(first, second)
    assert first.shape == (3, 16, 16)


def test_crops_cover_half_to_all_of_the_area():
    """A ramp that encodes the position: the crop's corners tell its box."""
    ramp = np.zeros((200, 200, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(200)[None, :], np.arange(200)[:, None]
    ramp = Image.fromarray(ramp)
    shares = []
    for seed in range(100):
        torch.manual_seed(seed)
        crop = np.asarray(random_resized_crop(ramp, 50)).astype(float)
        scale = 50 / 49
        width = (crop[25, -1, 0] - crop[25, 0, 0]) * scale
        height = (crop[-1, 25, 1] - crop[0, 25, 1]) * scale
        shares.append(width * height / 200**2)
    assert 0.45 < min(shares) < 0.6 and 0.9 < max(shares) < 1.06


def test_crop_of_an_extreme_image_falls_back_to_the_centre():
    wide = Image.new("RGB", (400, 10))
    torch.manual_seed(0)
    assert random_resized_crop(wide, 8).size == (8, 8)


def test_the_ten_operations():
    assert list(OPERATIONS) == [
        "Identity",
        "AutoContrast",
        "Brightness",
        "Sharpness",
        "Equalize",
        "ShearX",
        "ShearY",
        "TranslateX",
        "TranslateY",
        "Rotate",
    ]


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_each_operation_keeps_the_size(name, image):
    changed = OPERATIONS[name](image, 0.9)
    assert changed.size == image.size and changed.mode == "RGB"
    assert (changed == image) == (name == "Identity")


def test_magnitude_five_of_brightness_is_the_identity(image):
    assert OPERATIONS["Brightness"](image, 0.5) == image
    strong = OPERATIONS["Brightness"](image, 1.0)
    assert strong == ImageEnhance.Brightness(image).enhance(1.9)


def test_translation_moves_five_pixels_and_fills_with_grey(image):
    torch.manual_seed(0)
    array = np.asarray(OPERATIONS["TranslateX"](image, 0.5))
    grey = (array == 128).all(-1).all(0)
    assert grey[:5].all() or grey[-5:].all()
    assert grey.sum() == 5


def test_half_of_the_operations_are_applied(image):
    augment = RandAugment(1, 10, operations=("Rotate",))
    torch.manual_seed(0)
    changed = sum(augment(image) != image for _ in range(200))
    assert 75 < changed < 125
    assert RandAugment(2, 5, probability=0.0)(image) == image
    with pytest.raises(ValueError, match="operations: expected some of"):
        RandAugment(operations=("Solarize",))
    with pytest.raises(ValueError, match=r"magnitude: expected 0\.\.10, got 11"):
        RandAugment(magnitude=11)


def test_pixels_without_statistics(image):
    pixels = to_pixels(image, mean=None)
    assert pixels.min() >= 0 and pixels.max() <= 1


def test_without_its_random_steps_training_is_testing(image):
    plain = TrainTransform(16, scale=None, flip=False, augment=None)
    assert torch.equal(plain(image), EvalTransform(16)(image))
