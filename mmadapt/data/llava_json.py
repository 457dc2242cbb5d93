"""Reader for LLaVA's conversation files: CC3M-595K `chat.json`, `llava_v1_5_mix665k.json`."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from mmadapt.data.errors import DataError
from mmadapt.data.files import ImageFolder, read_json
from mmadapt.data.images import find_problems
from mmadapt.data.sample import Message, Sample, image_part, text_part

IMAGE_MARKER = "<image>"

Pair = tuple[str, str]


class LlavaJson(Dataset[Sample]):
    """Records `{id, image?, conversations: [{from, value}, ...]}` -> chat messages.

    `image` is a path below `image_root` (default: `images/` beside the file if there is one,
    else the file's folder), a list of such paths, or absent. Unknown keys are ignored. A
    leading turn that is not the human's and a trailing turn without a reply are dropped, as in
    LLaVA; records left without a pair are left out with a warning and listed in `skipped`.
    The images replace the `<image>` markers of the first question, one for one; elsewhere the
    marker is plain text. `limit` keeps the first records.

    Raises DataError (file and record named) for records that break these rules.
    """

    def __init__(
        self,
        file: str | os.PathLike[str],
        image_root: str | os.PathLike[str] | None = None,
        *,
        limit: int | None = None,
        allow_links: bool = False,
    ):
        self.file = Path(file)
        if image_root is None:
            beside = self.file.parent / "images"
            image_root = beside if beside.is_dir() else self.file.parent
        self._folder = ImageFolder(image_root, allow_links=allow_links)
        self.skipped: list[str] = []
        self._records: list[tuple[dict[str, Any], list[Pair]]] = []
        for index, record in enumerate(read_json(self.file, list)[:limit]):
            pairs = self._checked(index, record)
            if pairs:
                self._records.append((record, pairs))
            else:
                self.skipped.append(str(record["id"]))
        if self.skipped:
            warnings.warn(
                f"{self.file}: left out {len(self.skipped)} records without a question and "
                f"reply, the first is {self.skipped[0]!r}",
                stacklevel=2,
            )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        record, pairs = self._records[index]
        rid = str(record["id"])
        paths = [self._folder.path(p, file=self.file, record=rid) for p in _images(record)]
        messages: list[Message] = []
        for number, (question, reply) in enumerate(pairs):
            content = _expand(question, paths) if number == 0 else [text_part(question)]
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": [text_part(reply)]})
        return Sample(id=rid, messages=messages, record=record)

    def validate(self) -> list[str]:
        """Fetch every sample and decode every image; the problems found, empty if none."""
        return find_problems(self, (record["id"] for record, _ in self._records))

    def _checked(self, index: int, record: Any) -> list[Pair]:
        """The record's (question, reply) pairs."""
        if not isinstance(record, dict) or "id" not in record:
            raise DataError.at(self.file, index, "expected an object with an id")
        rid = record["id"]
        turns = record.get("conversations")
        if not isinstance(turns, list):
            raise DataError.at(self.file, rid, f"conversations: expected a list, got {turns!r}")
        for number, turn in enumerate(turns):
            if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
                raise DataError.at(self.file, rid, f"turn {number}: expected from and value")
        if turns and turns[0].get("from") != "human":
            turns = turns[1:]
        turns = turns[: len(turns) // 2 * 2]
        for number, turn in enumerate(turns):
            expected = "gpt" if number % 2 else "human"
            if turn.get("from") != expected:
                raise DataError.at(
                    self.file, rid, f"expected a turn from {expected!r}, got {turn.get('from')!r}"
                )
        images = _images(record)
        if turns and images and turns[0]["value"].count(IMAGE_MARKER) != len(images):
            raise DataError.at(
                self.file,
                rid,
                f"{len(images)} images, but {turns[0]['value'].count(IMAGE_MARKER)} "
                f"{IMAGE_MARKER} markers in the first question",
            )
        values = [turn["value"] for turn in turns]
        return list(zip(values[::2], values[1::2], strict=True))


def _images(record: dict[str, Any]) -> list[Any]:
    image = record.get("image")
    if image is None:
        return []
    return image if isinstance(image, list) else [image]


def _expand(question: str, paths: list[str]) -> list[dict[str, str]]:
    if not paths:
        return [text_part(question)]
    first, *rest = question.split(IMAGE_MARKER)
    content = [text_part(first)]
    for path, text in zip(paths, rest, strict=True):
        content += [image_part(path), text_part(text)]
    return [part for part in content if part != text_part("")]
