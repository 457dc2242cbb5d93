"""Videos as frames: which ones, and how they are read from a folder of images or a video file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from mmadapt.data.errors import DataError
from mmadapt.data.image_transforms import EvalTransform
from mmadapt.data.images import open_image

Sampling = Literal["random", "uniform", "window"]
VIDEO_FILES = (".mp4", ".avi", ".mkv", ".webm", ".mov")
FRAME_FILES = (".jpg", ".jpeg", ".png")
INSTALL = "install decord (pip install decord) or PyAV (pip install av) to read video files"


def random_frames(total: int, count: int) -> list[int]:
    """`count` frames in order, drawn without repeats (with repeats if there are fewer)."""
    drawn = torch.randperm(total)[:count].tolist()
    while len(drawn) < count:
        drawn.append(int(torch.randint(total, ())))
    return sorted(drawn)


def uniform_frames(total: int, count: int) -> list[int]:
    """The middles of `count` equal parts: the same frames every time."""
    return [min(total - 1, int((i + 0.5) * total / count)) for i in range(count)]


def window_frames(
    total: int, count: int, *, fps: float, target_fps: float = 3.0, start: float | None = None
) -> list[int]:
    """`count` frames `1 / target_fps` seconds apart, from one window that begins at random.

    The released DiDeMo decoder: 8 frames at 3 fps see 2.7 seconds of a clip. `start` in [0, 1]
    places the window; None draws it.
    """
    step = fps / target_fps
    room = max(0.0, total - step * count)
    place = float(torch.rand(())) if start is None else start
    first = room * place
    return [min(total - 1, int(first + i * step)) for i in range(count)]


class VideoFrames:
    """Frames `[T, 3, size, size]` of one video, sampled and transformed.

    Args:
        count: T.
        transform: frame to pixels; by default a bicubic square of `size` and CLIP statistics.
            The released DiDeMo loader crops and does not normalise: see `resize_and_crop` and
            `to_pixels(mean=None)`.
        sampling: "random" (training; the released code at test time too), "uniform" (reporting)
            or "window" (released DiDeMo).
        fps: of folders of frames, which do not know theirs; "window" needs it.
    """

    def __init__(
        self,
        count: int = 8,
        *,
        size: int = 224,
        sampling: Sampling = "uniform",
        transform: Callable[[Image.Image], Tensor] | None = None,
        fps: float = 30.0,
    ) -> None:
        if sampling not in ("random", "uniform", "window"):
            raise ValueError(f"sampling: expected random, uniform or window, got {sampling!r}")
        self.count, self.sampling, self.fps = count, sampling, fps
        self.transform = transform or EvalTransform(size)

    def __call__(self, path: str, record: object = None) -> Tensor:
        """Raises DataError (file and record named) for a video that cannot be read, ImportError
        for a video file without a decoder."""
        read = _folder if Path(path).is_dir() else _file
        return torch.stack([self.transform(frame) for frame in read(path, self._choose, record)])

    def _choose(self, total: int, fps: float | None) -> list[int]:
        if self.sampling == "random":
            return random_frames(total, self.count)
        if self.sampling == "uniform":
            return uniform_frames(total, self.count)
        return window_frames(total, self.count, fps=fps or self.fps)


_Choose = Callable[[int, float | None], list[int]]


def find_video(root: Path, name: str, *, file: object, record: object) -> str:
    """`root/name` as a folder of frames, or with the suffix of a video file.

    Raises:
        DataError: neither is there, or the name leads out of the folder.
    """
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError.at(str(file), record, f"video name {name!r} leaves the data folder")
    found = [root / name] + [root / (name + suffix) for suffix in VIDEO_FILES]
    for path in found:
        if path.is_dir() or (path.is_file() and path.suffix.lower() in VIDEO_FILES):
            return str(path)
    hint = ""
    if (root / "data.mdb").exists():
        hint = "; the folder is an LMDB: write its values out as files first"
    raise DataError.at(str(file), record, f"video {root / name}(.mp4, ...) is missing{hint}")


def _folder(path: str, choose: _Choose, record: object) -> Sequence[Image.Image]:
    files = sorted(p for p in Path(path).iterdir() if p.suffix.lower() in FRAME_FILES)
    if not files:
        raise DataError.at(path, record, "folder holds no frames (.jpg, .png)")
    return [open_image(str(files[i]), record) for i in choose(len(files), None)]


def _file(path: str, choose: _Choose, record: object) -> Sequence[Image.Image]:
    try:
        import decord
    except ImportError:
        return _with_av(path, choose, record)
    try:
        reader = decord.VideoReader(path, num_threads=1)
        indices = choose(len(reader), float(reader.get_avg_fps()))
        return [Image.fromarray(frame) for frame in reader.get_batch(indices).asnumpy()]
    except decord.DECORDError as error:
        raise DataError.at(path, record, f"video cannot be decoded ({error})") from error


def _with_av(path: str, choose: _Choose, record: object) -> Sequence[Image.Image]:
    try:
        import av
    except ImportError as error:
        raise ImportError(f"{path}: {INSTALL}, or give a folder of frames") from error
    try:
        with av.open(path) as container:
            rate = container.streams.video[0].average_rate
            frames = list(container.decode(video=0))
            indices = choose(len(frames), float(rate) if rate else None)
            return [frames[i].to_image() for i in indices]
    except (av.FFmpegError, IndexError) as error:
        raise DataError.at(path, record, f"video cannot be decoded ({error})") from error
