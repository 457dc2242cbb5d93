"""The whole objective: it learns, it is exact about what it keeps, it refuses what cannot be."""

import pytest
import torch
from torch import nn

from mmadapt.models.aurora import RetrievalObjective, VQAObjective


def test_training_lowers_the_loss(tiny):
    model = tiny.make_retrieval()
    objective = RetrievalObjective(model, enc_token_id=tiny.ENC, queue_size=4, ice="off").train()
    objective.set_progress(epoch=0, batch=0, batches=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    batch, losses = tiny.make_batch(), []
    for _ in range(40):
        out = objective(**batch)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append((out.itc.item(), out.itm.item()))
    assert losses[-1][0] < 0.7 * losses[0][0]
    assert losses[-1][1] < 0.7 * losses[0][1]


def test_only_what_trains_is_stored_for_momentum(tiny):
    model = tiny.make_retrieval().requires_grad_(False)
    model.vision_proj.requires_grad_(True)
    model.itm_head.requires_grad_(True)
    objective = RetrievalObjective(model, enc_token_id=tiny.ENC, queue_size=4)
    assert objective.momentum.stored() == sum(p.numel() for p in model.vision_proj.parameters())
    with pytest.raises(ValueError, match="momentum_factors: expected live or ema, got 'off'"):
        RetrievalObjective(model, enc_token_id=tiny.ENC, queue_size=4, momentum_factors="off")


def test_frozen_weights_and_temperature_stay(tiny):
    model = tiny.make_retrieval().requires_grad_(False)
    model.itm_head.requires_grad_(True)
    objective = RetrievalObjective(model, enc_token_id=tiny.ENC, queue_size=4, temperature=0.6)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        objective(**tiny.make_batch()).loss.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != name.startswith("itm_head"), name
    assert float(objective.temperature.detach()) == 0.5  # clamped before the step


def test_momentum_without_dropout_is_reproducible(tiny):
    model = tiny.make_retrieval(dropout=0.5).train()
    batch = tiny.make_batch()
    del batch["image_ids"]
    inputs = (batch["pixel_values"], batch["input_ids"], batch["attention_mask"])
    for dropout in (True, False):
        objective = RetrievalObjective(
            model, enc_token_id=tiny.ENC, queue_size=4, momentum_dropout=dropout
        ).train()
        with torch.no_grad():
            first = objective._momentum_features(*inputs)[1]
            second = objective._momentum_features(*inputs)[1]
        assert torch.equal(first, second) != dropout
        assert (
            model.training and model.text_encoder.encoder.layer[0].attention.self.dropout.training
        )


def test_dropout_inside_adapted_keys_forbids_sharing(tiny):
    model = tiny.make_retrieval()
    for layer in model.text_encoder.encoder.layer:
        attention = layer.crossattention.self
        attention.key = nn.Sequential(attention.key, nn.Dropout(0.1))
    objective = RetrievalObjective(model, enc_token_id=tiny.ENC, queue_size=4).train()
    assert not objective._shares()
    objective.share_image_states = True
    with pytest.raises(ValueError, match="share_image_states: adapters drop out"):
        objective(**tiny.make_batch())
    objective.eval()
    assert objective._shares()


def test_activation_checkpointing_gives_the_same_gradients(tiny):
    grads = []
    for checkpointing in (True, False):
        model = tiny.make_retrieval()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        objective = RetrievalObjective(model, enc_token_id=tiny.ENC, queue_size=4).train()
        assert objective._shares() != checkpointing
        torch.manual_seed(1)
        objective(**tiny.make_batch()).loss.backward()
        grads.append(model.text_encoder.encoder.layer[0].crossattention.self.key.weight.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)


def test_other_models_are_refused(tiny, tiny_vqa):
    with pytest.raises(ValueError, match="expected a BlipForImageTextRetrieval"):
        RetrievalObjective(tiny_vqa, enc_token_id=tiny.ENC)
    with pytest.raises(ValueError, match="expected a BlipForQuestionAnswering"):
        VQAObjective(tiny.make_retrieval())
    objective = RetrievalObjective(tiny.make_retrieval(), enc_token_id=tiny.ENC, queue_size=4)
    batch = tiny.make_batch()
    batch["pixel_values"] = batch["pixel_values"][0]
    with pytest.raises(ValueError, match=r"pixel_values: expected \[B, 3, H, W\]"):
        objective(**batch)


def test_other_image_sizes_interpolate_positions(tiny):
    objective = RetrievalObjective(tiny.make_retrieval(), enc_token_id=tiny.ENC, queue_size=4)
    batch = tiny.make_batch()
    batch["pixel_values"] = torch.randn(4, 3, 12, 12)
    assert torch.isfinite(objective(**batch).loss)


def test_contrast_runs_in_fp32_under_autocast(tiny):
    losses = []
    for enabled in (False, True):
        torch.manual_seed(0)
        objective = RetrievalObjective(tiny.make_retrieval(), enc_token_id=tiny.ENC, queue_size=4)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(objective(**tiny.make_batch()).itc)
    assert losses[1].dtype == torch.float32
    torch.testing.assert_close(losses[1], losses[0], rtol=0.03, atol=0)
