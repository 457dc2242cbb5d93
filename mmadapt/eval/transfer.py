"""What learning one more task gained there and cost on the tasks before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmadapt.eval._batches import Dataset, Progress, eval_mode, model_inputs, run_batched
from mmadapt.eval.results import Drift


def answer_drift(
    model: nn.Module,
    collator: Any,
    dataset: Dataset,
    restore_before: Callable[[], None],
    restore_after: Callable[[], None],
    *,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Drift:
    """Change of likelihood, and of the whole distribution, per answer token of `dataset`.

    Both notice damage before accuracies do: ``CE(after) - CE(before)`` in nats, and
    ``KL(p_before || p_after)``.

    Args:
        model: holds either set of weights.
        collator: built with `with_labels=True`.
        dataset: held-out samples of the earlier tasks.
        restore_before, restore_after: put the weights before and after the new task into `model`;
            the latter is called last.
    """
    before_loss = after_loss = divergence = 0.0
    count = 0

    def step(indices: Sequence[int], samples: list[Any]) -> None:
        nonlocal before_loss, after_loss, divergence, count
        batch = collator(samples)
        labels = batch.pop("labels")
        inputs = model_inputs(model, batch, collator.encoder.image_token_id)
        restore_before()
        p, targets = _log_probabilities(model, inputs, labels)
        restore_after()
        q, _ = _log_probabilities(model, inputs, labels)
        before_loss -= float(p.gather(1, targets).sum())
        after_loss -= float(q.gather(1, targets).sum())
        divergence += float((p.exp() * (p - q)).sum())
        count += len(targets)

    with eval_mode(model), torch.no_grad():
        run_batched(dataset, batch_size, step, progress)
    if count == 0:
        raise ValueError("dataset: no token is labelled, expected at least one")
    return Drift(before_loss / count, after_loss / count, divergence / count)


def _log_probabilities(
    model: nn.Module, inputs: dict[str, Tensor], labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Float64 log-probabilities ``[N, V]`` at the N labelled positions; the labels ``[N, 1]``."""
    logits = model(**inputs).logits[:, :-1].double()
    targets = labels[:, 1:].to(logits.device)
    chosen = targets != -100
    return logits[chosen].log_softmax(-1), targets[chosen].unsqueeze(1)
