"""Samples -> a batch for `Blip2ForConditionalGeneration` or `LlavaForConditionalGeneration`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mmadapt.data.encode import IGNORE, EncodedSample, SampleEncoder
from mmadapt.data.images import PixelLoader
from mmadapt.data.sample import Sample
from mmadapt.data.template import PillTemplate


class PillCollator:
    """Batches of PILL's layout: `collator(samples)` -> tensors, S the longest row.

    input_ids, attention_mask [B, S] int64; labels [B, S] int64 with -100 for prompt and padding
    (only `with_labels`); pixel_values [n, 3, H, W] with the images of all rows in order. A
    batch without images carries one zero image that no position refers to: the model's forward
    needs pixel_values, and every rank must touch the projector.

    `with_labels=False` gives prompts for generation: padded on the left and never truncated,
    because a prompt without its end asks nothing. With labels, rows are cut to `max_length`
    tokens; an image the cut would go through is dropped as a whole. Counted since construction
    (in each loader worker for itself): `dropped_images`, and `unlabelled_samples`, rows whose
    answer was cut off.

    `image_processor` is called as `image_processor(images=[PIL image], return_tensors="pt")`;
    results are cached by path up to `cache_bytes`. `template` defaults to PillTemplate(), without
    the literal `<image>` text when that is the tokenizer's own image token.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_processor: Callable[..., Any],
        *,
        image_token_id: int,
        num_image_tokens: int,
        max_length: int = 512,
        with_labels: bool = True,
        pad_side: Literal["left", "right"] | None = None,
        template: PillTemplate | None = None,
        strip_around_image: bool = True,
        cache_bytes: int = 256 * 2**20,
    ):
        if max_length < 1:
            raise ValueError(f"max_length: expected at least 1, got {max_length}")
        if pad_side not in ("left", "right", None):
            raise ValueError(f"pad_side: expected 'left', 'right' or None, got {pad_side!r}")
        self.encoder = SampleEncoder(
            tokenizer,
            image_token_id=image_token_id,
            num_image_tokens=num_image_tokens,
            template=template,
            strip_around_image=strip_around_image,
        )
        self.pixels = PixelLoader(image_processor, cache_bytes)
        self.max_length = max_length
        self.with_labels = with_labels
        self.pad_side = pad_side or ("right" if with_labels else "left")
        self.dropped_images = 0
        self.unlabelled_samples = 0

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        if not samples:
            raise ValueError("samples: expected at least one, got none")
        rows = [self._encode(sample) for sample in samples]
        batch = {
            "input_ids": self._pad([row.ids for row in rows], self.encoder.pad_id),
            "attention_mask": self._pad([[1] * len(row.ids) for row in rows], 0),
        }
        if self.with_labels:
            batch["labels"] = self._pad([row.labels for row in rows], IGNORE)
        images = [
            self.pixels(path, sample.id)
            for sample, row in zip(samples, rows, strict=True)
            for _, path in row.spans
        ]
        batch["pixel_values"] = torch.stack(images or [self.pixels.zero()])
        return batch

    def _encode(self, sample: Sample) -> EncodedSample:
        if not self.with_labels:
            return self.encoder.encode_prompt(sample)
        row = self.encoder.encode(sample)
        self.dropped_images += row.truncate(self.max_length, self.encoder.num_image_tokens)
        self.unlabelled_samples += all(label == IGNORE for label in row.labels)
        return row

    def _pad(self, rows: list[list[int]], value: int) -> Tensor:
        width = max(map(len, rows))
        padded = []
        for row in rows:
            padding = [value] * (width - len(row))
            padded.append(padding + row if self.pad_side == "left" else row + padding)
        return torch.tensor(padded, dtype=torch.int64)
