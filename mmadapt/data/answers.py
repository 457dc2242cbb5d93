"""Readers of open-ended questions: VQAv2 (and Visual Genome), MSRVTT-QA."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from mmadapt.data.caption_text import clean_question
from mmadapt.data.errors import DataError
from mmadapt.data.files import ImageFolder, read_json
from mmadapt.data.images import find_problems
from mmadapt.data.sample import Message, Sample, image_part, text_part, video_part
from mmadapt.data.video import find_video

VG_WEIGHT = 0.2
VIDEO_WEIGHT = 0.05


@dataclass(frozen=True)
class AnswerSample(Sample):
    """A question about an image or video; `answers` with a `weight` each (none in test files)."""

    question: str = ""
    answers: list[str] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    question_id: Any = None


class AnswerReader(Dataset[AnswerSample]):
    """What the two readers share."""

    file: Path
    _records: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> AnswerSample:
        record = self._records[index]
        question = self._question(record)
        answers = self._answers(record)
        content = [self._part(index, record), text_part(question)]
        messages: list[Message] = [{"role": "user", "content": content}]
        if answers:
            replies = [text_part(answer) for answer in answers]
            messages.append({"role": "assistant", "content": replies})
        return AnswerSample(
            f"{self.file.stem}/{index}",
            messages,
            record,
            question=question,
            answers=list(answers),
            weights=list(answers.values()),
            question_id=record.get(self._id_field),
        )

    def validate(self) -> list[str]:
        """Fetch every sample and decode every image; the problems found, empty if none."""
        return find_problems(self, range(len(self)))

    _id_field = "question_id"

    def _question(self, record: dict[str, Any]) -> str:
        raise NotImplementedError

    def _answers(self, record: dict[str, Any]) -> dict[str, float]:
        raise NotImplementedError

    def _part(self, index: int, record: dict[str, Any]) -> dict[str, str]:
        raise NotImplementedError


class VQAv2(AnswerReader):
    """`vqa_train.json`, `vqa_val.json`, `vqa_test.json`, `vg_qa.json`: lists of records.

    Fields: `question`, `image` (below `image_root`, default the file's folder), and in files to
    train on `answer`: the annotators' answers (a list), each distinct one weighted by its share;
    or one string, weighted 0.2 (`dataset: "vg"`). `question_id` names a question in results.
    """

    def __init__(
        self,
        file: str | os.PathLike[str],
        image_root: str | os.PathLike[str] | None = None,
        *,
        max_words: int = 50,
        limit: int | None = None,
        allow_links: bool = False,
    ):
        self.file, self.max_words = Path(file), max_words
        self._folder = ImageFolder(image_root or self.file.parent, allow_links=allow_links)
        self._records = read_json(self.file, list)[:limit]
        for index, record in enumerate(self._records):
            _check(self.file, index, record, {"question": str, "image": str})
            answer = record.get("answer", [])
            if not isinstance(answer, (str, list)) or not all(isinstance(a, str) for a in answer):
                raise DataError.at(self.file, index, f"answer: expected strings, got {answer!r}")

    def _question(self, record: dict[str, Any]) -> str:
        return clean_question(record["question"], self.max_words)

    def _answers(self, record: dict[str, Any]) -> dict[str, float]:
        answer = record.get("answer", [])
        if isinstance(answer, str):
            return {answer: VG_WEIGHT}
        return {text: count / len(answer) for text, count in Counter(answer).items()}

    def _part(self, index: int, record: dict[str, Any]) -> dict[str, str]:
        return image_part(self._folder.path(record["image"], file=self.file, record=index))


class MSRVTTQA(AnswerReader):
    """`train_qa.json`, `test_qa.json`: `video_id` (file `video<id>`), `question`, `answer`, `id`.

    The questions are used as they are; the answer weighs 0.05.
    """

    _id_field = "id"

    def __init__(
        self,
        file: str | os.PathLike[str],
        video_root: str | os.PathLike[str] | None = None,
        *,
        limit: int | None = None,
    ):
        self.file = Path(file)
        self._root = Path(video_root or self.file.parent)
        self._records = read_json(self.file, list)[:limit]
        fields = {"question": str, "answer": str, "video_id": int}
        for index, record in enumerate(self._records):
            _check(self.file, index, record, fields)

    def _question(self, record: dict[str, Any]) -> str:
        return record["question"]

    def _answers(self, record: dict[str, Any]) -> dict[str, float]:
        return {record["answer"]: VIDEO_WEIGHT}

    def _part(self, index: int, record: dict[str, Any]) -> dict[str, str]:
        name = f"video{record['video_id']}"
        return video_part(find_video(self._root, name, file=self.file, record=index))


def read_answer_list(file: str | os.PathLike[str]) -> list[str]:
    """`answer_list.json`: the candidates that are ranked."""
    answers = read_json(file, list)
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise DataError(f"{file}: expected a list of strings, at least one")
    return answers


def _check(file: Path, index: int, record: Any, fields: dict[str, type]) -> None:
    if not isinstance(record, dict):
        raise DataError.at(file, index, "expected an object")
    for name, kind in fields.items():
        if not isinstance(record.get(name), kind):
            raise DataError.at(
                file, index, f"{name}: expected {kind.__name__}, got {record.get(name)!r}"
            )
