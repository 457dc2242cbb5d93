"""The contrastive loss against a dense reference in double precision."""

import pytest
import torch
from torch.nn.functional import normalize

from mmadapt.models.aurora import contrastive_loss, hard_targets, ramped_alpha


def reference(image, text, image_m, text_m, ids, image_q, text_q, ids_q, temperature, alpha):
    """Row by row, in float64."""
    d = torch.float64
    every_text = torch.cat([text_m, text_q]).to(d)
    every_image = torch.cat([image_m, image_q]).to(d)
    every_id = torch.cat([ids, ids_q])
    total = 0.0
    for online, momentum, candidates in (
        (image, image_m, every_text),
        (text, text_m, every_image),
    ):
        for b in range(len(ids)):
            match = torch.tensor([1.0 if ids[b] == i else 0.0 for i in every_id], dtype=d)
            soft = torch.softmax(candidates @ momentum[b].to(d) / temperature, 0)
            target = alpha * soft + (1 - alpha) * match / match.sum()
            logp = torch.log_softmax(candidates @ online[b].to(d) / temperature, 0)
            total -= float((target * logp).sum()) / len(ids)
    return total / 2


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_against_a_dense_reference_with_duplicate_ids(alpha):
    torch.manual_seed(0)
    features = [normalize(torch.randn(5, 8), dim=1) for _ in range(4)]
    queues = [normalize(torch.randn(12, 8), dim=1) for _ in range(2)]
    ids = torch.tensor([0, 1, 1, 2, 0])  # captions of one image in one batch
    ids_q = torch.tensor([-100] * 6 + [1, 2, 2, 7, 8, 0])
    loss = contrastive_loss(
        *features,
        ids,
        image_queue=queues[0],
        text_queue=queues[1],
        queue_ids=ids_q,
        temperature=0.07,
        alpha=alpha,
    )
    expected = reference(*features, ids, *queues, ids_q, 0.07, alpha)
    assert abs(float(loss) - expected) <= 1e-6 * max(1.0, expected)


def test_targets_share_one_between_equal_ids():
    targets = hard_targets(torch.tensor([3, 4]), torch.tensor([3, 4, 3, -100]))
    assert targets.tolist() == [[0.5, 0, 0.5, 0], [0, 1, 0, 0]]


def test_alpha_ramps_over_the_first_epoch():
    values = [ramped_alpha(0.4, epoch=0, batch=i, batches=4) for i in range(6)]
    assert values == [0.0, 0.1, 0.2, pytest.approx(0.3, abs=1e-15), 0.4, 0.4]
    assert ramped_alpha(0.4, epoch=1, batch=0, batches=4) == 0.4
