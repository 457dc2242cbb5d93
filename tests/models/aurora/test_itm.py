"""Matching: order, labels, mean, shared keys and values, rows without negatives."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from mmadapt.models.aurora import Negatives, RetrievalObjective


def fixed(index):
    """A sampler that always answers with these rows."""
    return lambda logits, ids, candidates: Negatives(index, torch.ones_like(index).bool())


def objective_of(tiny, model, **options):
    torch.manual_seed(0)
    return RetrievalObjective(model, enc_token_id=tiny.ENC, queue_size=12, **options).train()


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("ice", ["off", "released"])
def test_the_mean_over_three_b_pairs(share, ice, tiny):
    """Against the pairs one by one through Hugging Face's own forward."""
    model = tiny.make_retrieval()
    objective = objective_of(tiny, model, ice=ice, share_image_states=share)
    objective.sampler = fixed(torch.tensor([1, 2, 3, 0]))
    batch = tiny.make_batch()
    itm = objective(**batch).itm

    pixels, mask = batch["pixel_values"], batch["attention_mask"]
    ids = batch["input_ids"].clone()
    ids[:, 0] = tiny.ENC
    negative = [1, 2, 3, 0]
    pairs = [(i, i, 1) for i in range(4)]
    pairs += [(i, negative[i], 0) for i in range(4)]  # text i, negative image
    pairs += [(negative[i], i, 0) for i in range(4)]  # negative text, image i
    context = model.text_encoder(batch["input_ids"], attention_mask=mask).last_hidden_state[:, 0]
    total = 0.0
    for text, image, label in pairs:
        seen = model(ids[text : text + 1], pixels[image : image + 1], attention_mask=mask[[text]])
        fused = seen.question_embeds[:, 0]
        if label and ice == "released":
            fused = fused + 0.1 * context.mean(0)
        total += cross_entropy(model.itm_head(fused), torch.tensor([label])).item()
    assert abs(itm.item() - total / 12) <= 1e-6


def test_sharing_changes_neither_loss_nor_gradients(tiny):
    results = []
    for share in (True, False):
        model = tiny.make_retrieval()
        objective = objective_of(tiny, model, share_image_states=share)
        torch.manual_seed(1)
        loss = objective(**tiny.make_batch()).loss
        loss.backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((loss.detach(), grads))
    assert abs(results[0][0] - results[1][0]) <= 1e-5 * abs(results[1][0])
    assert (results[0][1] - results[1][1]).norm() <= 1e-5 * results[1][1].norm()


def test_shared_states_save_the_projections(tiny):
    """The image goes through each layer's key projection once, not three times."""
    rows = {}
    for share in (True, False):
        model = tiny.make_retrieval()
        objective = objective_of(tiny, model, share_image_states=share)
        seen = rows.setdefault(share, [])
        key = model.text_encoder.encoder.layer[0].crossattention.self.key
        key.register_forward_hook(lambda _, args, __, seen=seen: seen.append(len(args[0])))
        objective(**tiny.make_batch())
    assert sum(rows[True]) == 4 and sum(rows[False]) == 12


def test_rows_of_one_image_alone_have_no_negative(tiny):
    model = tiny.make_retrieval()
    objective = objective_of(tiny, model, ice="off")
    batch = tiny.make_batch(image_ids=[7, 7, 7, 7])
    loss = objective(**batch).itm
    ids = batch["input_ids"].clone()
    ids[:, 0] = tiny.ENC
    scores = model(ids, batch["pixel_values"], attention_mask=batch["attention_mask"]).itm_score
    positives = cross_entropy(scores, torch.ones(4, dtype=torch.int64))
    torch.testing.assert_close(loss, positives)


def test_frame_aware_scaling_reaches_matching_only_when_asked(tiny):
    batch = tiny.make_batch(frames=3)
    losses = []
    for aware in (True, False):
        objective = objective_of(tiny, tiny.make_retrieval(), frame_aware=aware)
        objective.sampler = fixed(torch.tensor([1, 2, 3, 0]))
        losses.append(objective(**batch))
    assert losses[0].itc == losses[1].itc and losses[0].itm != losses[1].itm


def test_shared_states_under_frame_scaling(tiny):
    batch, losses = tiny.make_batch(frames=2), []
    for share in (True, False):
        objective = objective_of(
            tiny, tiny.make_retrieval(), frame_aware=True, share_image_states=share
        )
        objective.sampler = fixed(torch.tensor([1, 2, 3, 0]))
        losses.append(objective(**batch).itm)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
