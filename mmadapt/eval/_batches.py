"""What generation and perplexity share: batches on the model's device, a model put to rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

Batch = dict[str, Tensor]
Progress = Callable[[int, int], None]
"""Called with (samples done, samples in total) after every batch."""


class Dataset(Protocol):
    """Map-style: what the readers of `mmadapt.data` return."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """`model.eval()` and back, module by module.

    A training run holds frozen towers in eval mode while the rest trains, so one
    `model.train()` at the end would not restore what was there.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def model_inputs(model: nn.Module, batch: Batch, image_token_id: int) -> Batch:
    """The batch on the model's device, without pixels that no token of it stands for.

    The collator adds a blank image to text-only batches because Blip2 cannot run without
    `pixel_values`; models whose main input is text (Llava) refuse an image without its tokens.
    """
    device = next(model.parameters()).device
    inputs = {key: value.to(device) for key, value in batch.items()}
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    takes_pixels = getattr(base, "main_input_name", "input_ids") == "pixel_values"
    if not takes_pixels and not bool((batch["input_ids"] == image_token_id).any()):
        inputs.pop("pixel_values", None)
    return inputs


def run_batched(
    dataset: Dataset,
    batch_size: int,
    step: Callable[[Sequence[int], list[Any]], None],
    progress: Progress | None,
) -> None:
    """Call `step(indices, samples)` over the data set, longest samples first.

    Like lengths share a batch, so little is padded, and an out-of-memory error comes at once.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
    samples = [dataset[i] for i in range(len(dataset))]
    order = sorted(range(len(samples)), key=lambda i: _length(samples[i]), reverse=True)
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        step(indices, [samples[i] for i in indices])
        if progress is not None:
            progress(start + len(indices), len(order))


def _length(sample: Any) -> tuple[int, int]:
    parts = [part for message in sample.messages for part in message["content"]]
    images = sum(part["type"] == "image" for part in parts)
    return images, sum(len(part["text"]) for part in parts if part["type"] == "text")


def count_scored(labels: Tensor) -> Tensor:
    """Positions a causal loss counts: labels after the first one that are not -100."""
    return (labels[:, 1:] != -100).sum()


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of nats over the labelled tokens. `logits` [B, S, V], `labels` [B, S]; fp32."""
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        labels[:, 1:].flatten().to(logits.device),
        ignore_index=-100,
        reduction="sum",
    )
