"""Samples -> a batch for `CromeForConditionalGeneration`: prefix, instruction, answer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from mmadapt.data.encode import IGNORE
from mmadapt.data.images import PixelLoader, open_image
from mmadapt.data.sample import Message, Sample
from mmadapt.data.template import ImageSlot, Turn, merge_text


class Template(Protocol):
    """Messages -> turns, as `PillTemplate`; where an image stands in the text does not matter."""

    def turns(self, messages: Sequence[Message]) -> list[Turn]: ...


class PlainTemplate:
    """Questions as they are, without any marks around them; a system message goes in front."""

    def turns(self, messages: Sequence[Message]) -> list[Turn]:
        system, turns = "", []
        for message in messages:
            parts = [
                ImageSlot(part["path"]) if part["type"] == "image" else part["text"]
                for part in message["content"]
            ]
            text = "".join(part for part in parts if isinstance(part, str))
            if message["role"] == "system":
                system = f"{text}\n"
            elif message["role"] == "user":
                turns.append(Turn(merge_text([system, *parts]), None))
                system = ""
            elif message["role"] == "assistant" and turns and turns[-1].answer is None:
                turns[-1] = Turn(turns[-1].prompt, text)
            else:
                raise ValueError(f"messages: a turn of {message['role']!r} has no place here")
        if not turns:
            raise ValueError("messages: expected at least one user message, got none")
        return turns


@dataclass
class _Row:
    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    text_branch: list[int] = field(default_factory=list)

    def add(self, ids: list[int], *, labelled: bool = False, text_branch: bool = False) -> None:
        self.ids += ids
        self.labels += ids if labelled else [IGNORE] * len(ids)
        self.text_branch += [int(text_branch)] * len(ids)


@dataclass(frozen=True)
class _Image:
    path: str
    question: list[int]


@dataclass(frozen=True)
class _Ids:
    """What evaluation reads from a collator."""

    image_token_id: int


class CromeCollator:
    """`collator(samples)` -> tensors for CROME.

    input_ids, attention_mask [B, S] int64 and, `with_labels`, labels [B, S] with -100 on image,
    instruction and padding; for an encoder-decoder input_ids are the encoder's and labels [B, A]
    the decoder's. pixel_values [n, 3, H, W], qformer_input_ids and qformer_attention_mask [n, L],
    one row for each image of the batch; a batch without images carries one blank image that no
    position refers to, so that every rank touches what trains. text_branch_mask [B, S] for R2.

    A row is laid out by `config.order`: placeholders of its images, the instruction (BOS first),
    then the answer with EOS. Rows without images have no prefix. Later turns follow as question and
    answer with EOS; an encoder-decoder reads all but the last answer. Each instruction keeps its
    last `max_instruction` tokens, each answer its first `max_answer` (EOS always).

    `with_labels=False` gives prompts for generation, padded on the left.

    Args:
        tokenizer: of the language model; needs EOS.
        image_processor: called as `image_processor(images=[PIL image], return_tensors="pt")`, with
            `key=` if it is a `CromeImageProcessor`. Deterministic results are cached by path.
        config: `CromeModelConfig` of the model.
        qformer_tokenizer: of the Q-Former's text; needed if `config.instruction_aware`.
        max_instruction, max_answer, max_question: limits in tokens; the last for the Q-Former.
        max_length: rows are cut behind the last whole turn that fits; None for no limit.
        template: marks around questions; `PlainTemplate()` by default.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_processor: Callable[..., Any],
        config: Any,
        *,
        qformer_tokenizer: Any = None,
        max_instruction: int = 128,
        max_answer: int = 256,
        max_question: int = 128,
        max_length: int | None = None,
        with_labels: bool = True,
        template: Template | None = None,
        cache_bytes: int = 256 * 2**20,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("tokenizer: has no EOS token, answers could not end")
        if config.image_token_id is None:
            raise ValueError("config.image_token_id: is None, expected the id of image positions")
        if config.instruction_aware and config.uses_queries and qformer_tokenizer is None:
            raise ValueError(
                "qformer_tokenizer: is None, but config.instruction_aware is true: the Q-Former "
                "reads the instruction in its own vocabulary"
            )
        limits = {
            "max_instruction": max_instruction,
            "max_answer": max_answer,
            "max_question": max_question,
        }
        for name, value in limits.items():
            if value < 2:
                raise ValueError(f"{name}: expected at least 2, got {value}")
        self.tokenizer, self.config, self.template = tokenizer, config, template or PlainTemplate()
        self.qformer_tokenizer = copy.deepcopy(qformer_tokenizer)
        if self.qformer_tokenizer is not None:
            self.qformer_tokenizer.truncation_side = "left"
        self.max_instruction, self.max_answer = max_instruction, max_answer
        self.max_question, self.max_length, self.with_labels = max_question, max_length, with_labels
        self.encoder = _Ids(config.image_token_id)
        self._random = getattr(image_processor, "is_random", False)
        self.pixels = PixelLoader(image_processor, 0 if self._random else cache_bytes)
        self._pad = tokenizer.pad_token_id
        if self._pad is None:
            self._pad = tokenizer.eos_token_id
        self._bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self._texts: dict[str, list[int]] = {}

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to an image processor that draws."""
        if hasattr(self.pixels.image_processor, "set_epoch"):
            self.pixels.image_processor.set_epoch(epoch)

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        if not samples:
            raise ValueError("samples: expected at least one, got none")
        rows, answers, images, pixels = [], [], [], []
        for sample in samples:
            turns = self.template.turns(sample.messages)
            found = self._images(sample, turns)
            row, answer = self._row(sample, turns, len(found))
            rows.append(row)
            answers.append(answer)
            images += found
            pixels += [self._load(image.path, sample.id) for image in found]
        left = not self.with_labels
        batch = {
            "input_ids": _pad([row.ids for row in rows], self._pad, left=left),
            "attention_mask": _pad([[1] * len(row.ids) for row in rows], 0, left=left),
        }
        if self.with_labels:
            decoder = self.config.is_encoder_decoder
            labels = answers if decoder else [row.labels for row in rows]
            batch["labels"] = _pad(labels, IGNORE, left=False)
        if self.config.reading == "R2":
            batch["text_branch_mask"] = _pad([row.text_branch for row in rows], 0, left=left)
        batch["pixel_values"] = torch.stack(pixels or [self.pixels.zero()])
        if self.qformer_tokenizer is not None and self.config.instruction_aware:
            questions = [image.question for image in images] or [[self._qformer_pad]]
            batch["qformer_input_ids"] = _pad(questions, self._qformer_pad, left=False)
            ones = [[1] * len(question) for question in questions]
            batch["qformer_attention_mask"] = _pad(ones, 0, left=False)
        return batch

    @property
    def _qformer_pad(self) -> int:
        return self.qformer_tokenizer.pad_token_id or 0

    def _images(self, sample: Sample, turns: list[Turn]) -> list[_Image]:
        """The images of all turns, each with what the Q-Former reads: the first question."""
        if self.config.num_image_tokens == 0:
            return []
        paths = [part.path for t in turns for part in t.prompt if isinstance(part, ImageSlot)]
        question: list[int] = []
        if paths and self.qformer_tokenizer is not None:
            user = next(m for m in sample.messages if m["role"] == "user")
            text = "".join(p["text"] for p in user["content"] if p["type"] == "text").strip()
            question = self.qformer_tokenizer(text, truncation=True, max_length=self.max_question)[
                "input_ids"
            ]
            question = question or [self._qformer_pad]
        return [_Image(path, question) for path in paths]

    def _load(self, path: str, sample: str) -> Tensor:
        if not self._random:
            return self.pixels(path, sample)
        image = open_image(path, sample)
        made = self.pixels.image_processor(
            images=[image], return_tensors="pt", key=f"{sample}/{path}"
        )
        return made["pixel_values"][0]

    def _row(self, sample: Sample, turns: list[Turn], images: int) -> tuple[_Row, list[int]]:
        first = self._instruction(_text(turns[0].prompt))
        row = self._prefix(first, images)
        answer: list[int] = []
        for number, turn in enumerate(turns):
            last = number == len(turns) - 1
            question = [] if number == 0 else self._instruction(_text(turn.prompt))
            if last and not self.with_labels:
                row.add(question)
                break
            if turn.answer is None:
                raise ValueError(f"sample {sample.id!r}: the last question has no answer")
            answer = self._answer(turn.answer)
            length = len(row.ids) + len(question) + len(answer)
            if number and self.max_length is not None and length > self.max_length:
                break
            row.add(question)
            if not (last and self.config.is_encoder_decoder):
                row.add(answer, labelled=True)
        return row, answer

    def _prefix(self, instruction: list[int], images: int) -> _Row:
        config, row = self.config, _Row()
        runs = list(config.image_tokens)
        for name in config.order:
            if name == "instruction":
                row.add(instruction)
            elif name == "text" and config.reading == "R2":
                row.add(instruction, text_branch=True)
            else:
                # All vectors of one side stand together, image by image.
                side = config.order.index(name) > config.order.index("instruction")
                row.add([config.image_token_id] * runs[side] * images)
                runs[side] = 0
        return row

    def _instruction(self, text: str) -> list[int]:
        ids = self._ids(text)
        return self._bos + ids[-(self.max_instruction - len(self._bos)) :]

    def _answer(self, text: str) -> list[int]:
        return [*self._ids(text)[: self.max_answer - 1], self.tokenizer.eos_token_id]

    def _ids(self, text: str) -> list[int]:
        if text not in self._texts:
            if len(self._texts) >= 16384:
                self._texts.clear()
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            # The image token's own string inside a text is text, never an image position.
            image, unknown = self.config.image_token_id, self.tokenizer.unk_token_id
            self._texts[text] = [i if i != image else unknown or 0 for i in ids]
        return list(self._texts[text])


def _text(prompt: Sequence[Any]) -> str:
    """The texts of a prompt joined where images stood, which are in front now."""
    return "".join(part for part in prompt if isinstance(part, str)).strip()


def _pad(rows: list[list[int]], value: int, *, left: bool) -> Tensor:
    width = max(map(len, rows))
    padded = [
        [value] * (width - len(row)) + row if left else row + [value] * (width - len(row))
        for row in rows
    ]
    return torch.tensor(padded, dtype=torch.int64)
