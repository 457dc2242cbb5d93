"""Which frames are taken, and what happens without a decoder."""

import sys

import pytest
import torch
from PIL import Image

from mmadapt.data import DataError
from mmadapt.data.image_transforms import resize_and_crop, to_pixels
from mmadapt.data.video import (
    VideoFrames,
    find_video,
    random_frames,
    uniform_frames,
    window_frames,
)


def test_uniform_frames_are_the_middles():
    assert uniform_frames(16, 4) == [2, 6, 10, 14]
    assert uniform_frames(2, 4) == [0, 0, 1, 1]
    assert uniform_frames(8, 8) == list(range(8))


def test_random_frames_are_sorted_and_distinct():
    torch.manual_seed(0)
    drawn = [random_frames(20, 8) for _ in range(50)]
    assert all(frames == sorted(set(frames)) and frames[-1] < 20 for frames in drawn)
    assert len({tuple(frames) for frames in drawn}) > 40
    assert len(random_frames(3, 8)) == 8


def test_window_frames_step_by_the_target_rate():
    assert window_frames(300, 8, fps=30, start=0.0) == [0, 10, 20, 30, 40, 50, 60, 70]
    assert window_frames(300, 8, fps=30, start=1.0)[0] == 220
    assert window_frames(20, 8, fps=30, start=0.5)[-1] == 19  # shorter than the window


def test_a_folder_of_frames(tmp_path):
    for i in range(6):
        Image.new("RGB", (16, 12), (i, i, i)).save(tmp_path / f"{i}.png")
    plain = VideoFrames(3, sampling="uniform", transform=lambda frame: to_pixels(frame, None))
    assert plain(str(tmp_path))[:, 0, 0, 0].mul(255).round().tolist() == [1, 3, 5]
    didemo = VideoFrames(
        2,
        sampling="window",
        fps=3,
        transform=lambda frame: to_pixels(resize_and_crop(frame, 8), mean=None),
    )
    pixels = didemo(str(tmp_path))
    assert pixels.shape == (2, 3, 8, 8) and pixels.min() >= 0 and pixels.max() <= 1
    with pytest.raises(ValueError, match="sampling: expected random"):
        VideoFrames(2, sampling="first")


def test_empty_folders_and_missing_decoders(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="holds no frames"):
        VideoFrames(2)(str(tmp_path))
    monkeypatch.setitem(sys.modules, "decord", None)
    monkeypatch.setitem(sys.modules, "av", None)
    clip = tmp_path / "video1.mp4"
    clip.write_bytes(b"")
    assert find_video(tmp_path, "video1", file="x", record=0) == str(clip)
    with pytest.raises(ImportError, match=r"install decord .* or PyAV"):
        VideoFrames(2)(str(clip))
    with pytest.raises(DataError, match="leaves the data folder"):
        find_video(tmp_path, "../x", file="x", record=0)
    (tmp_path / "data.mdb").write_bytes(b"")
    with pytest.raises(DataError, match="is an LMDB"):
        find_video(tmp_path, "video2", file="x", record=0)
