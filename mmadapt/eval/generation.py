"""Greedy batched generation through Hugging Face `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from mmadapt.data import PillCollator
from mmadapt.eval._batches import (
    Batch,
    Dataset,
    Progress,
    eval_mode,
    model_inputs,
    run_batched,
)


def generate_answers(
    model: nn.Module,
    tokenizer: Any,
    collator: PillCollator,
    dataset: Dataset,
    *,
    batch_size: int = 32,
    max_new_tokens: int = 64,
    blank_images: bool = False,
    progress: Progress | None = None,
) -> list[str]:
    """What the model writes after each prompt, in the order of the data set.

    Works for `Blip2ForConditionalGeneration`, `LlavaForConditionalGeneration` and a `PeftModel`
    around either. Decoding is greedy (PILL's sampler at temperature 0.1 keeps the top token
    nearly always) and stops at EOS; a text is cut at its first EOS. The training mode of every
    module is restored; a `use_cache = False` left by training is overridden for the call only.

    Args:
        tokenizer: decodes; its `eos_token_id` ends an answer.
        collator: built with `with_labels=False`: prompts only, left padded.
        blank_images: replace every image by a black one (see `blank_pixels`).
        progress: called with (done, total) after every batch.

    Raises:
        ValueError: the collator returns labels or pads on the right, the tokenizer has no EOS.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: has no eos_token, expected one that ends an answer")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: got {max_new_tokens}, expected at least 1")
    texts = [""] * len(dataset)

    def step(indices: Sequence[int], samples: list[Any]) -> None:
        batch = collator(samples)
        _check_prompts(batch)
        if blank_images:
            batch["pixel_values"] = blank_pixels(
                collator.pixels.image_processor, batch["pixel_values"]
            )
        tokens = _generate(model, tokenizer, batch, collator.encoder.image_token_id, max_new_tokens)
        for index, row in zip(indices, tokens.tolist(), strict=True):
            texts[index] = _decode(tokenizer, row)

    # not inference_mode: what an adapter caches under it could not enter a later backward
    with eval_mode(model), torch.no_grad():
        run_batched(dataset, batch_size, step, progress)
    return texts


def blank_pixels(image_processor: Any, pixel_values: Tensor) -> Tensor:
    """A black picture, processed like any other, in the shape and dtype of `pixel_values`.

    Zeros after normalisation would be mid-grey, a colour the processor's own mean decides;
    black goes through the same resize and normalisation as the pictures it stands for.
    `pixel_values`: [n, 3, H, W].
    """
    height, width = pixel_values.shape[-2:]
    black = Image.new("RGB", (width, height))
    blank = image_processor(images=black, return_tensors="pt")["pixel_values"]
    return blank.to(pixel_values).expand_as(pixel_values).clone()


def _check_prompts(batch: Batch) -> None:
    if "labels" in batch:
        raise ValueError("collator: returned labels, expected one built with with_labels=False")
    if not bool(batch["attention_mask"][:, -1].all()):
        raise ValueError("collator: padded on the right, expected left padding for generation")


def _generate(
    model: nn.Module, tokenizer: Any, batch: Batch, image_token_id: int, max_new_tokens: int
) -> Tensor:
    """New tokens [B, <= max_new_tokens], padded after EOS."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    output = model.generate(
        **model_inputs(model, batch, image_token_id),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,  # chat checkpoints ship one; the argmax must be the model's own
        use_cache=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad,
    )
    # `generate` returns the prompt as well unless it was called with embeddings alone, which
    # differs between model classes and releases; a prompt is never generated verbatim.
    prompt = batch["input_ids"].to(output.device)
    width = prompt.shape[1]
    if output.shape[1] >= width and torch.equal(output[:, :width], prompt):
        return output[:, width:]
    return output


def _decode(tokenizer: Any, tokens: list[int]) -> str:
    if tokenizer.eos_token_id in tokens:
        tokens = tokens[: tokens.index(tokenizer.eos_token_id)]
    return tokenizer.decode(tokens, skip_special_tokens=True)
