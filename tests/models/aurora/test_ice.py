"""Informative context: which rows it touches, and where its gradient goes."""

import pytest
import torch

from mmadapt.models.aurora import ICE_MODES, InformativeContext, RetrievalObjective

POSITIVE, NEGATIVE, TEXT = torch.randn(3, 5), torch.randn(6, 5), torch.randn(4, 5)


def test_off_is_bit_identical():
    positive, negative = InformativeContext("off").train_pairs(POSITIVE, NEGATIVE, TEXT)
    assert positive is POSITIVE and negative is NEGATIVE


def test_released_changes_positives_only():
    positive, negative = InformativeContext("released").train_pairs(POSITIVE, NEGATIVE, TEXT)
    torch.testing.assert_close(positive, POSITIVE + 0.1 * TEXT.mean(0))
    assert negative is NEGATIVE


@pytest.mark.parametrize("mode", ["symmetric", "symmetric+inference"])
def test_symmetric_adds_the_same_to_both(mode):
    positive, negative = InformativeContext(mode, factor=0.2).train_pairs(POSITIVE, NEGATIVE, TEXT)
    torch.testing.assert_close(positive - POSITIVE, (0.2 * TEXT.mean(0)).expand(3, -1))
    torch.testing.assert_close(negative - NEGATIVE, (0.2 * TEXT.mean(0)).expand(6, -1))


def test_inference_is_touched_in_one_mode_only():
    context = TEXT.mean(0)
    for mode in ICE_MODES:
        scored = InformativeContext(mode).scored_pairs(POSITIVE, context)
        assert (scored is POSITIVE) == (mode != "symmetric+inference")
    with pytest.raises(ValueError, match="context: mode 'symmetric"):
        InformativeContext("symmetric+inference").scored_pairs(POSITIVE, None)


def test_unknown_mode():
    with pytest.raises(ValueError, match=r"mode: expected one of off, released.* got 'on'"):
        InformativeContext("on")


@pytest.mark.parametrize("mode", ["off", "released"])
def test_gradient_reaches_the_text_encoder_through_the_context(mode, tiny):
    """With fused states cut off, only the context ties the ITM loss to the unimodal text."""
    model = tiny.make_retrieval()
    objective = RetrievalObjective(model, enc_token_id=tiny.ENC, queue_size=4, ice=mode)
    batch = tiny.make_batch()
    text = objective.blip.text_encoder(batch["input_ids"], attention_mask=batch["attention_mask"])
    state = text.last_hidden_state[:, 0]
    fused = torch.randn(4, tiny.WIDTH), torch.randn(8, tiny.WIDTH)
    positive, negative = objective.ice.train_pairs(*fused, state)
    loss = model.itm_head(torch.cat([positive, negative])).square().sum()
    loss.backward()
    gradient = model.text_encoder.embeddings.word_embeddings.weight.grad
    assert (gradient is not None and bool(gradient.any())) == (mode == "released")
