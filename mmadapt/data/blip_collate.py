"""Batches for BLIP's objectives: pixels or frames, padded texts, ids, answers with weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mmadapt.data.answers import AnswerSample
from mmadapt.data.captions import CaptionSample
from mmadapt.data.errors import DataError
from mmadapt.data.images import open_image
from mmadapt.data.sample import Sample
from mmadapt.data.video import VideoFrames

Padding = Literal["max_length", "longest"]


class VisualLoader:
    """Pixels `[3, H, W]` of a sample's image, or `[T, 3, H, W]` of its video.

    `transform` acts on images, `frames` on videos. A video that cannot be decoded is an error,
    or with `skip_broken` replaced in its batch by another one, counted and warned about.
    """

    def __init__(
        self,
        transform: Callable[..., Tensor],
        frames: VideoFrames | None = None,
        *,
        skip_broken: bool = False,
    ) -> None:
        self.transform, self.frames, self.skip_broken = transform, frames, skip_broken
        self.broken = 0

    def __call__(self, sample: Sample) -> Tensor:
        (part,) = [p for p in sample.messages[0]["content"] if p["type"] in ("image", "video")]
        if part["type"] == "image":
            return self.transform(open_image(part["path"], sample.id))
        if self.frames is None:
            raise ValueError("frames: the data holds videos; give a VideoFrames")
        return self.frames(part["path"], sample.id)

    def usable(self, samples: Sequence[Sample]) -> tuple[list[Any], Tensor]:
        """Samples and their stacked pixels, as many as came in."""
        loaded = []
        for sample in samples:
            try:
                loaded.append((sample, self(sample)))
            except DataError as error:
                if not self.skip_broken:
                    raise
                self.broken += 1
                warnings.warn(f"left out: {error}", stacklevel=2)
        if not loaded:
            raise DataError(f"no sample of a batch of {len(samples)} could be read")
        good = len(loaded)
        loaded += [loaded[i % good] for i in range(len(samples) - good)]
        return [sample for sample, _ in loaded], torch.stack([pixels for _, pixels in loaded])


class RetrievalCollator:
    """`pixel_values`, `input_ids`, `attention_mask`, `image_ids` of CaptionSamples.

    Texts begin with [CLS], end with [SEP] and have `max_length` (35) tokens; `padding="longest"`
    saves the padding where no shape has to stay fixed. A sample with several captions
    contributes a random one.
    """

    def __init__(
        self,
        tokenizer: Any,
        visual: VisualLoader,
        *,
        max_length: int = 35,
        padding: Padding = "max_length",
    ) -> None:
        self.tokenizer, self.visual = tokenizer, visual
        self.max_length, self.padding = max_length, padding

    def __call__(self, samples: Sequence[CaptionSample]) -> dict[str, Tensor]:
        samples, pixels = self.visual.usable(samples)
        captions = [_one(sample.captions) for sample in samples]
        texts = tokenize(self.tokenizer, captions, self.max_length, self.padding)
        numbers = torch.tensor([sample.number for sample in samples])
        return {"pixel_values": pixels, **texts, "image_ids": numbers}


class AnswerCollator:
    """What `mmadapt.models.aurora.VQAObjective` takes, from AnswerSamples.

    Questions begin with [ENC] and are padded to the longest, at most `max_length`; answers begin
    with [DEC].
    """

    def __init__(
        self,
        tokenizer: Any,
        visual: VisualLoader,
        *,
        enc_token_id: int,
        dec_token_id: int,
        max_length: int = 35,
    ) -> None:
        self.tokenizer, self.visual, self.max_length = tokenizer, visual, max_length
        self.enc_token_id, self.dec_token_id = enc_token_id, dec_token_id

    def __call__(self, samples: Sequence[AnswerSample]) -> dict[str, Tensor]:
        batch = self.questions(samples)
        samples = batch.pop("samples")
        answers = [answer for sample in samples for answer in sample.answers]
        if not answers:
            raise DataError("answers: the samples of a training batch have none")
        return {
            **batch,
            **self.answers(answers),
            "weights": torch.tensor([w for sample in samples for w in sample.weights]),
            "counts": torch.tensor([len(sample.answers) for sample in samples]),
        }

    def questions(self, samples: Sequence[AnswerSample]) -> dict[str, Any]:
        """`pixel_values`, `input_ids`, `attention_mask`, and the `samples` they belong to."""
        samples, pixels = self.visual.usable(samples)
        asked = [sample.question for sample in samples]
        texts = tokenize(self.tokenizer, asked, self.max_length, "longest")
        texts["input_ids"][:, 0] = self.enc_token_id
        return {"pixel_values": pixels, **texts, "samples": samples}

    def answers(self, answers: Sequence[str]) -> dict[str, Tensor]:
        """`answer_ids`, `answer_mask` of answer texts."""
        texts = tokenize(self.tokenizer, answers, self.max_length, "longest")
        texts["input_ids"][:, 0] = self.dec_token_id
        return {"answer_ids": texts["input_ids"], "answer_mask": texts["attention_mask"]}


def tokenize(
    tokenizer: Any, texts: Sequence[str], max_length: int, padding: Padding
) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` `[N, L]`: [CLS] text [SEP], cut to `max_length` tokens."""
    encoded = tokenizer(
        list(texts), padding=padding, truncation=True, max_length=max_length, return_tensors="pt"
    )
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


def _one(captions: Sequence[str]) -> str:
    if len(captions) == 1:
        return captions[0]
    return captions[int(torch.randint(len(captions), ()))]
