"""Frame-aware attention: scaled logits are scaled keys."""

import torch
from torch.nn.functional import normalize

from mmadapt.models.aurora import (
    CrossStates,
    encode_pairs,
    encode_visual,
    frame_aware,
    frame_weights,
    token_scale,
)
from mmadapt.models.aurora.frame_attention import scaled_attention


def test_logits_form_is_key_form():
    torch.manual_seed(0)
    query = torch.randn(2, 2, 4, 8, dtype=torch.float64)
    keys, values = torch.randn(2, 2, 2, 6, 8, dtype=torch.float64)
    scale = torch.rand(2, 6, dtype=torch.float64) + 0.5
    out, _ = scaled_attention(query, keys, values, scale)
    scaled = keys * scale[:, None, :, None]
    expected = (query @ scaled.transpose(-1, -2) / 8**0.5).softmax(-1) @ values
    assert (out - expected).abs().max() <= 1e-12


def test_in_the_model_it_equals_scaling_the_keys(tiny):
    """Key form by a hook on every key projection, fp64."""
    model = tiny.make_retrieval().double().eval()
    batch = tiny.make_batch(frames=3)
    hidden = encode_visual(model, batch["pixel_values"].double()).hidden
    scale = token_scale(torch.rand(4, 3, dtype=torch.float64) + 0.5, hidden.shape[1] // 3)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    logits_form = encode_pairs(model, ids, mask, hidden=hidden, scale=scale)
    plain = encode_pairs(model, ids, mask, hidden=hidden)
    for layer in model.text_encoder.encoder.layer:
        layer.crossattention.self.key.register_forward_hook(
            lambda module, args, out: out * scale[:, :, None]
        )
    key_form = encode_pairs(model, ids, mask, hidden=hidden)
    assert (logits_form - key_form).abs().max() <= 1e-12
    assert (logits_form - plain).abs().max() > 1e-3


def test_cls_tokens_are_untouched_and_patches_weighted():
    scale = token_scale(torch.tensor([[0.5, 1.5]]), 3)
    assert scale.tolist() == [[1, 0.5, 0.5, 1, 1.5, 1.5]]


def test_weights_average_one_and_carry_no_gradient():
    text = normalize(torch.randn(5, 8), dim=-1).requires_grad_()
    frames = normalize(torch.randn(5, 8, 8), dim=-1).requires_grad_()
    weights = frame_weights(text, frames)
    assert not weights.requires_grad
    torch.testing.assert_close(weights.mean(1), torch.ones(5))
    # cosines in [-1, 1] at T = 8: sigma between 0.64 and 1.53
    assert weights.min() > 0.64 and weights.max() < 1.54
    expected = torch.softmax((frames @ text[:, :, None]).squeeze(-1) / 4, 1) * 8
    torch.testing.assert_close(weights, expected.detach())


def test_shared_states_serve_scaled_attention(tiny):
    model = tiny.make_retrieval().eval()
    batch = tiny.make_batch(frames=2)
    hidden = encode_visual(model, batch["pixel_values"]).hidden
    scale = torch.rand(4, hidden.shape[1]) + 0.5
    states = CrossStates.of(model.text_encoder, hidden)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    shared = encode_pairs(model, ids, mask, states=states, scale=scale)
    direct = encode_pairs(model, ids, mask, hidden=hidden, scale=scale)
    torch.testing.assert_close(shared, direct)


def test_the_block_leaves_no_trace(tiny):
    model = tiny.make_retrieval()
    attention = model.text_encoder.encoder.layer[0].crossattention.self
    before = dict(attention.__dict__)
    with frame_aware(model.text_encoder, torch.ones(1, 4)):
        assert "forward" in attention.__dict__
    assert attention.__dict__.keys() == before.keys()
