"""Image-text contrastive loss with a queue and soft targets (BLIP; ALBEF section 3.2 there)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import log_softmax


def ramped_alpha(alpha: float, *, epoch: int, batch: int, batches: int) -> float:
    """Weight of the soft targets: rises linearly over the batches of epoch 0, then constant."""
    if epoch > 0:
        return alpha
    return alpha * min(1.0, batch / batches)


def hard_targets(ids: Tensor, candidate_ids: Tensor) -> Tensor:
    """`[B, N]`: the candidates with the row's id share 1 between them. `ids` [B], the other [N].

    Every row needs such a candidate; the momentum features of the batch itself bring one.
    """
    same = (ids[:, None] == candidate_ids).float()
    return same / same.sum(1, keepdim=True)


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    image_momentum: Tensor,
    text_momentum: Tensor,
    ids: Tensor,
    *,
    image_queue: Tensor,
    text_queue: Tensor,
    queue_ids: Tensor,
    temperature: Tensor | float,
    alpha: float,
) -> Tensor:
    """Mean of image-to-text and text-to-image cross-entropy against soft targets, a scalar.

    Features `[B, D]` have unit length; the queues are `[Q, D]`, ids `[B]` and `[Q]`. Candidates
    are the batch's own momentum features, then the queue. The target of a row is
    `alpha * softmax(momentum similarities / temperature) + (1 - alpha) * hard_targets`.
    """
    with torch.no_grad():
        hard = hard_targets(ids, torch.cat([ids, queue_ids]))
        soft_i2t = _similarities(image_momentum, text_momentum, text_queue) / temperature
        soft_t2i = _similarities(text_momentum, image_momentum, image_queue) / temperature
        target_i2t = alpha * soft_i2t.softmax(1) + (1 - alpha) * hard
        target_t2i = alpha * soft_t2i.softmax(1) + (1 - alpha) * hard
    i2t = _similarities(image, text_momentum, text_queue) / temperature
    t2i = _similarities(text, image_momentum, image_queue) / temperature
    return (_soft_cross_entropy(i2t, target_i2t) + _soft_cross_entropy(t2i, target_t2i)) / 2


def _similarities(features: Tensor, batch: Tensor, queue: Tensor) -> Tensor:
    # two products, one concatenation of logits: the candidates themselves are never copied
    return torch.cat([features @ batch.T, features @ queue.T], dim=1)


def _soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return -(targets * log_softmax(logits, dim=1)).sum(1).mean()
