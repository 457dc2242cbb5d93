"""What tuning did to the language model: text-only accuracy and perplexity, before and after."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mmadapt.data import PillCollator
from mmadapt.eval._batches import (
    Dataset,
    Progress,
    count_scored,
    eval_mode,
    model_inputs,
    run_batched,
    summed_loss,
)
from mmadapt.eval.evaluate import evaluate_scienceqa
from mmadapt.eval.results import TextProbe
from mmadapt.eval.scienceqa import has_image


class TextOnly:
    """The samples of a data set whose record has no image, in order."""

    def __init__(self, dataset: Dataset) -> None:
        self._samples = [
            sample
            for sample in (dataset[i] for i in range(len(dataset)))
            if not has_image(sample.record)
        ]
        if not self._samples:
            raise ValueError("dataset: has no sample without an image, expected at least one")

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Any:
        return self._samples[index]


def text_perplexity(
    model: nn.Module,
    collator: PillCollator,
    dataset: Dataset,
    *,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> float:
    """exp of the mean nats per labelled token, over all tokens of the set (not per batch).

    `collator` is built with `with_labels=True`.

    Raises:
        ValueError: the collator returns no labels, or no token of the set is labelled.
    """
    loss, count = 0.0, 0

    def step(indices: Sequence[int], samples: list[Any]) -> None:
        nonlocal loss, count
        batch = collator(samples)
        if "labels" not in batch:
            raise ValueError("collator: returned no labels, expected with_labels=True")
        labels = batch.pop("labels")
        logits = model(**model_inputs(model, batch, collator.encoder.image_token_id)).logits
        loss += summed_loss(logits, labels).item()
        count += int(count_scored(labels))

    with eval_mode(model), torch.no_grad():
        run_batched(dataset, batch_size, step, progress)
    if count == 0:
        raise ValueError("dataset: no token is labelled, expected at least one")
    mean = loss / count
    return math.exp(mean) if mean < 700 else math.inf  # exp overflows a double at 709


def probe_text(
    model: nn.Module,
    tokenizer: Any,
    prompt_collator: PillCollator,
    label_collator: PillCollator,
    dataset: Dataset,
    *,
    batch_size: int = 32,
    max_new_tokens: int = 64,
    progress: Progress | None = None,
) -> TextProbe:
    """Accuracy and perplexity on the samples without an image.

    Call it on the untouched model (or under `model.disable_adapter()`) and on the tuned one and
    put both into `Forgetting(before, after)`.
    """
    text_only = TextOnly(dataset)
    result = evaluate_scienceqa(
        model,
        tokenizer,
        prompt_collator,
        text_only,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        progress=progress,
    )
    perplexity = text_perplexity(model, label_collator, text_only, batch_size=batch_size)
    return TextProbe(result.table.columns["AVG"], perplexity)
