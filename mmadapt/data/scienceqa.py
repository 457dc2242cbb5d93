"""Reader for ScienceQA's released layout (also digits-vqa): problems -> chat messages."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from mmadapt.data.errors import DataError
from mmadapt.data.files import ImageFolder, read_json
from mmadapt.data.images import find_problems
from mmadapt.data.prompts import (
    DEFAULT_FORMAT,
    DEFAULT_SYSTEM,
    LETTERS,
    answer_text,
    check_format,
    question_body,
)
from mmadapt.data.sample import Message, Sample, image_part, text_part
from mmadapt.data.wrong_answers import Variant, WrongAnswers

_TEXT_FIELDS = ("question", "hint", "grade", "subject", "lecture", "solution", "split")
_HELD_OUT = ("val", "test", "minival", "minitest")


class ScienceQA(Dataset[Sample]):
    """A split of a ScienceQA folder: `problems.json`, `pid_splits.json`, image folders.

    `split` is any name in `pid_splits.json`: train, val, test, trainval, minitrain, minival,
    minitest. Images stand in `<root>/<split>/<id>/` or, as LaVIN has them, in
    `<root>/images/<split>/<id>/`; a problem shows its `image`, or all of its `images` if it has
    that key. `prompt` is one of `prompts.PROMPT_FORMATS`; `system=""` leaves the system message
    out; `use_caption` adds `captions.json` to the context; `limit` keeps the first problems.

    `wrong_answer_rate` > 0 redraws letters at every fetch, for training splits only; call
    `set_epoch` before each epoch. Sample.record keeps the true answer.

    Raises DataError (file and record named) for files, fields or indices that are wrong; an
    image is looked up when its sample is fetched, and decoded by `validate()` or the collator.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        prompt: str = DEFAULT_FORMAT,
        *,
        system: str = DEFAULT_SYSTEM,
        use_caption: bool = False,
        wrong_answers: Variant = "uniform_all",
        wrong_answer_rate: float = 0.0,
        seed: int = 0,
        limit: int | None = None,
        allow_links: bool = False,
    ):
        self.root = Path(root)
        self.split = split
        self.prompt = check_format(prompt)
        self.system = system
        self.epoch = 0
        self.wrong_answers = WrongAnswers(wrong_answer_rate, wrong_answers, seed)
        if wrong_answer_rate and split in _HELD_OUT:
            raise ValueError(
                f"wrong_answer_rate: must be 0 for split {split!r}: evaluation uses true answers"
            )
        self.file = self.root / "problems.json"
        self.ids = self._split_ids()[:limit]
        everything = read_json(self.file, dict)
        self.problems = {pid: self._checked(pid, everything.get(pid)) for pid in self.ids}
        self._captions = self._read_captions() if use_caption else {}
        self._folder = ImageFolder(self.root, allow_links=allow_links)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self.ids))[index]
        pid = self.ids[index]
        problem = self.problems[pid]
        letter = self.wrong_answers.draw(
            problem["answer"], len(problem["choices"]), epoch=self.epoch, index=index
        )
        messages: list[Message] = []
        if self.system:
            messages.append({"role": "system", "content": [text_part(self.system)]})
        body = question_body(problem, self.prompt, self._caption(pid))
        images = [image_part(path) for path in self._image_paths(pid, problem)]
        head = [text_part("Image:"), *images] if images else [text_part("Image:N/A")]
        messages.append({"role": "user", "content": [*head, text_part(f".\n{body}")]})
        answer = answer_text(problem, self.prompt, letter)
        messages.append({"role": "assistant", "content": [text_part(answer)]})
        return Sample(id=pid, messages=messages, record=problem)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose wrong answers are drawn from now on."""
        self.epoch = epoch

    def validate(self) -> list[str]:
        """Fetch every sample and decode every image; the problems found, empty if none."""
        return find_problems(self, self.ids)

    def _split_ids(self) -> list[str]:
        file = self.root / "pid_splits.json"
        splits = read_json(file, dict)
        if self.split not in splits:
            raise DataError(f"{file}: no split {self.split!r}; it has {sorted(splits)}")
        ids = splits[self.split]
        if not isinstance(ids, list) or not all(isinstance(pid, str) for pid in ids):
            raise DataError(f"{file}: split {self.split!r} is not a list of problem ids")
        return ids

    def _read_captions(self) -> dict[str, str]:
        file = self.root / "captions.json"
        captions = read_json(file, dict).get("captions")
        if not isinstance(captions, dict):
            raise DataError(f"{file}: expected an object under the key 'captions'")
        return captions

    def _caption(self, pid: str) -> str:
        caption = self._captions.get(pid, "")
        if not isinstance(caption, str):
            raise DataError.at(
                self.root / "captions.json", pid, f"expected a string, got {caption!r}"
            )
        return caption

    def _checked(self, pid: str, problem: Any) -> dict[str, Any]:
        """`problem` if a sample can be made of it."""

        def wrong(text: str) -> DataError:
            return DataError.at(self.file, pid, text)

        if not isinstance(problem, dict):
            raise wrong("named in pid_splits.json, no such problem")
        for name in _TEXT_FIELDS:
            if not isinstance(problem.get(name), str):
                raise wrong(f"{name}: expected a string, got {problem.get(name)!r}")
        choices, answer = problem.get("choices"), problem.get("answer")
        if (
            not isinstance(choices, list)
            or not 2 <= len(choices) <= len(LETTERS)
            or not all(isinstance(choice, str) for choice in choices)
        ):
            raise wrong(f"choices: expected 2 to {len(LETTERS)} strings, got {choices!r}")
        if type(answer) is not int or answer not in range(len(choices)):
            raise wrong(f"answer: expected a choice index 0..{len(choices) - 1}, got {answer!r}")
        image, images = problem.get("image"), problem.get("images")
        if images is not None and (not isinstance(images, list) or images[:1] != [image]):
            raise wrong(f"images: expected a list that starts with {image!r}, got {images!r}")
        return problem

    def _image_paths(self, pid: str, problem: dict[str, Any]) -> list[str]:
        if problem.get("image") is None:
            return []
        folder = f"{problem['split']}/{pid}"
        if not (self.root / folder).is_dir() and (self.root / "images").is_dir():
            folder = f"images/{folder}"
        names = problem.get("images", [problem["image"]])
        return [self._folder.path(f"{folder}/{name}", file=self.file, record=pid) for name in names]
