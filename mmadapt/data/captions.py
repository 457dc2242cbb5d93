"""Readers of captioned images and videos: COCO and Flickr30k (Karpathy), MSRVTT, DiDeMo."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from torch.utils.data import Dataset

from mmadapt.data.caption_text import clean_caption
from mmadapt.data.errors import DataError
from mmadapt.data.files import ImageFolder, read_json
from mmadapt.data.images import find_problems
from mmadapt.data.sample import Sample, image_part, text_part, video_part
from mmadapt.data.video import find_video


@dataclass(frozen=True)
class CaptionSample(Sample):
    """An image or video with its captions as the assistant's words, cleaned.

    `number`: of the image, dense from 0 in order of appearance; captions of one image share it.
    """

    number: int = -1

    @property
    def captions(self) -> list[str]:
        return [part["text"] for part in self.messages[-1]["content"]]


class CaptionReader(Dataset[CaptionSample]):
    """What the readers share; `texts` and `text_image` describe the whole set as a gallery."""

    file: Path
    _records: list[tuple[dict[str, Any], list[str], int]]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> CaptionSample:
        record, captions, number = self._records[index]
        messages = [
            {"role": "user", "content": [self._part(index, record)]},
            {"role": "assistant", "content": [text_part(caption) for caption in captions]},
        ]
        return CaptionSample(f"{self.file.stem}/{index}", messages, record, number=number)

    @property
    def texts(self) -> list[str]:
        """All captions in order."""
        return [caption for _, captions, _ in self._records for caption in captions]

    @property
    def numbers(self) -> list[int]:
        """The image number of each sample."""
        return [number for _, _, number in self._records]

    @property
    def text_image(self) -> list[int]:
        """The number of the image of each text."""
        return [number for _, captions, number in self._records for _ in captions]

    def validate(self) -> list[str]:
        """Fetch every sample and decode every image; the problems found, empty if none."""
        return find_problems(self, range(len(self)))

    def _part(self, index: int, record: dict[str, Any]) -> dict[str, str]:
        raise NotImplementedError


class KarpathyCaptions(CaptionReader):
    """`coco_karpathy_*.json`, `flickr30k_*.json`: lists of records with `image` and `caption`.

    Training files hold a record a caption (a string, with `image_id`), test files a record an
    image (a list of captions). `image` is a path below `image_root` (default: the file's
    folder); `basename` keeps only its last part, as the Flickr30k loaders do. `limit` keeps the
    first records, `max_words` of a cleaned caption are kept.

    Raises DataError (file and record named) for records that break these rules.
    """

    def __init__(
        self,
        file: str | os.PathLike[str],
        image_root: str | os.PathLike[str] | None = None,
        *,
        basename: bool = False,
        max_words: int = 30,
        limit: int | None = None,
        allow_links: bool = False,
    ):
        self.file, self.basename = Path(file), basename
        self._folder = ImageFolder(image_root or self.file.parent, allow_links=allow_links)
        self._records = []
        numbers: dict[Any, int] = {}
        for index, record in enumerate(read_json(self.file, list)[:limit]):
            captions = self._captions(index, record)
            key = record.get("image_id", record["image"])
            number = numbers.setdefault(key, len(numbers))
            cleaned = [clean_caption(caption, max_words) for caption in captions]
            self._records.append((record, cleaned, number))

    def _captions(self, index: int, record: Any) -> list[str]:
        if not isinstance(record, dict) or not isinstance(record.get("image"), str):
            raise DataError.at(self.file, index, "expected an object with image, a path")
        captions = record.get("caption")
        captions = [captions] if isinstance(captions, str) else captions
        good = isinstance(captions, list) and captions
        if not good or not all(isinstance(caption, str) for caption in captions):
            raise DataError.at(
                self.file, index, f"caption: expected a string or a list, got {captions!r}"
            )
        return captions

    def _part(self, index: int, record: dict[str, Any]) -> dict[str, str]:
        image = record["image"]
        if self.basename:
            image = PurePosixPath(image).name
        return image_part(self._folder.path(image, file=self.file, record=index))


def flickr30k(
    file: str | os.PathLike[str],
    image_root: str | os.PathLike[str] | None = None,
    *,
    max_words: int = 30,
    limit: int | None = None,
    allow_links: bool = False,
) -> KarpathyCaptions:
    """`KarpathyCaptions` whose image paths count by their last part only."""
    return KarpathyCaptions(
        file,
        image_root,
        basename=True,
        max_words=max_words,
        limit=limit,
        allow_links=allow_links,
    )


class VideoCaptions(CaptionReader):
    """MSRVTT's and DiDeMo's `*.jsonl`: lines with `caption` and `clip_name`.

    A clip is `video_root/clip_name` as a folder of frames, or with `.mp4` or the like. Clips of
    one name share a number, so several captions of a clip are no negatives of each other.
    """

    def __init__(
        self,
        file: str | os.PathLike[str],
        video_root: str | os.PathLike[str] | None = None,
        *,
        max_words: int = 40,
        limit: int | None = None,
    ):
        self.file = Path(file)
        self._root = Path(video_root or self.file.parent)
        self._records = []
        numbers: dict[str, int] = {}
        for index, record in enumerate(read_json_lines(self.file)[:limit]):
            caption, clip = record.get("caption"), record.get("clip_name")
            if not isinstance(caption, str) or not isinstance(clip, str):
                raise DataError.at(self.file, index, "expected caption and clip_name, strings")
            number = numbers.setdefault(clip, len(numbers))
            self._records.append((record, [clean_caption(caption, max_words)], number))

    def _part(self, index: int, record: dict[str, Any]) -> dict[str, str]:
        found = find_video(self._root, record["clip_name"], file=self.file, record=index)
        return video_part(found)


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file; empty lines are passed over."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read ({error})") from error
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{file}: line {number} is broken JSON ({error})") from error
        if not isinstance(record, dict):
            raise DataError(f"{file}: line {number}: expected an object, got {line[:40]!r}")
        records.append(record)
    return records
