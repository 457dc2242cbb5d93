"""Guard rails: stop a run that trains something else than the recipe says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from mmadapt.train.components import Components
from mmadapt.train.errors import GuardError

# Components whose gradient comes from image tokens alone: not judged on a step without one.
VISUAL = {"projector", "vision_expert", "gate", "adapter", "vision_tower", "qformer"}


def samples_to_judge(image_fraction: float) -> int | None:
    """Samples after which a lack of images can no longer be chance (probability below 1e-9).

    None for data without images: nothing is to be expected there.
    """
    if image_fraction <= 0:
        return None
    if image_fraction >= 1:
        return 1
    return math.ceil(math.log(1e-9) / math.log1p(-image_fraction))


def image_fraction(dataset: Any, *, probes: int = 256) -> float:
    """Share of samples with an image, over `probes` samples spread evenly over the data."""
    step = max(len(dataset) // probes, 1)
    indices = range(0, len(dataset), step)
    return sum(_has_image(dataset[i]) for i in indices) / len(indices)


def _has_image(sample: Any) -> bool:
    return any(
        part["type"] == "image" for message in sample.messages for part in message["content"]
    )


class Guards(TrainerCallback):
    """Raises GuardError when a component gets no gradient, images never arrive, loss blows up.

    Gradients are judged per component at the first optimizer step whose batches hold what the
    component needs: single tensors may be zero there, as zero-initialised up-projections leave
    the down-projections without a gradient at the start.
    """

    def __init__(
        self, components: Components, *, stage: str, image_token_id: int, image_fraction: float
    ) -> None:
        self._pending = dict(components)
        self._stage = stage
        self._image_token_id = image_token_id
        self._patience = samples_to_judge(image_fraction)
        self._samples = 0
        self._tokens_in_step = 0

    def see(self, inputs: Mapping[str, Tensor]) -> None:
        """Look at a micro-batch on its way into the model."""
        if self._patience is None and not self._pending:
            return
        tokens = int((inputs["input_ids"] == self._image_token_id).sum())
        self._tokens_in_step += tokens
        if tokens:
            self._patience = None
        if self._patience is None:
            return
        self._samples += len(inputs["input_ids"])
        if self._samples >= self._patience:
            raise GuardError(
                f"stage {self._stage}: no visual token in the first {self._samples} samples, but "
                "the data has images. Does the collator write the model's image token "
                f"(id {self._image_token_id}), and does max_length leave room for it?"
            )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        silent = []
        for name, tensors in list(self._pending.items()):
            if name in VISUAL and self._tokens_in_step == 0:
                continue
            del self._pending[name]
            if not any(p.grad is not None and p.grad.count_nonzero() for _, p in tensors):
                silent.append(name)
        self._tokens_in_step = 0
        if silent:
            raise GuardError(
                f"stage {self._stage}: no gradient reached {', '.join(silent)} in step "
                f"{state.global_step + 1}, although the recipe trains it. Is the component "
                "connected to the loss in this model?"
            )

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any
    ) -> None:
        for key in ("loss", "train_loss"):
            value = (logs or {}).get(key)
            if value is not None and not math.isfinite(value):
                raise GuardError(
                    f"stage {self._stage}: {key} is {value} at step {state.global_step}; lower "
                    "the learning rate or train in float32"
                )
