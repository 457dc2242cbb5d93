"""Gated Query Transformation: the published formula, only beside images."""

import pytest
import torch

from mmadapt.peft.aurora.query_transform import AuroraQueryTransform


@pytest.fixture
def model(tiny):
    base = tiny.base("retrieval", dtype=torch.float64)
    return tiny.aurora("retrieval", base, gqt_factor=0.3).double()


def layer_of(model):
    return model.get_base_model().text_encoder.encoder.layer[0]


def vectors(layer):
    return [getattr(layer.output, name)["default"] for name in layer.output.adapter_layer_names]


def states():
    x = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    return x, torch.randn(2, 3, 32, dtype=torch.float64, requires_grad=True)


def test_formula(model):
    layer, (x, image) = layer_of(model), states()
    a, _ = layer.attention(x)
    c, _ = layer.crossattention(a, encoder_hidden_states=image)
    scale_self, shift_self, scale_cross, shift_cross = vectors(layer)
    ffn = layer.output.base_layer(layer.intermediate(c), c)
    expected = ffn + 0.3 * (a * scale_self + shift_self) + 0.3 * (c * scale_cross + shift_cross)
    found = layer(x, image)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    leaves, dy = [x, image, *vectors(layer)], torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, leaves, dy),
        torch.autograd.grad(expected, leaves, dy),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_gradients_as_published(model):
    """``d scale = f sum_t g a``, ``d shift = f sum_t g``."""
    layer, (x, image) = layer_of(model), states()
    a, _ = layer.attention(x)
    g = torch.randn(2, 5, 32, dtype=torch.float64)
    scale, shift, *_ = torch.autograd.grad(layer(x, image), vectors(layer), g)
    torch.testing.assert_close(scale, 0.3 * (g * a).sum((0, 1)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(shift, 0.3 * g.sum((0, 1)), rtol=1e-12, atol=1e-12)


def test_text_alone_is_not_transformed(model):
    layer, (x, image) = layer_of(model), states()
    before = layer(x)
    layer(x, image)  # what it saw of an image must not stay
    with torch.no_grad():
        for vector in vectors(layer):
            vector.normal_()
    assert torch.equal(layer(x), before)
    assert not torch.autograd.grad(layer(x).sum(), vectors(layer), allow_unused=True)[0]


def test_off_on_disabled_and_left_out(tiny):
    batch = tiny.batch("retrieval")
    for config in ({"gqt": False}, {"components": ["vit_qkv", "text_self"]}):
        model = tiny.aurora("retrieval", **config)
        assert not any(isinstance(m, AuroraQueryTransform) for m in model.modules())
    base = tiny.base("retrieval")
    expected = tiny.scores("retrieval", base, batch)
    with tiny.aurora("retrieval", base).disable_adapter() as _, torch.no_grad():
        torch.testing.assert_close(base(**batch).itm_score, expected, rtol=0, atol=0)


def test_every_stack_has_its_own(tiny):
    model = tiny.aurora("vqa", components=["decoder"])
    paths = [n for n, m in model.named_modules() if isinstance(m, AuroraQueryTransform)]
    assert len(paths) == 2 and all("text_decoder" in path for path in paths)


def test_layers_to_transform(tiny):
    model = tiny.aurora("vqa", layers_to_transform=[1])
    paths = [n for n, m in model.named_modules() if hasattr(m, "mmadapt_aurora_config")]
    assert paths and all(".1." in path for path in paths)


def test_unload_leaves_no_hooks(tiny):
    base, batch = tiny.base("retrieval"), tiny.batch("retrieval")
    expected, names = tiny.scores("retrieval", base, batch), [n for n, _ in base.named_modules()]
    restored = tiny.aurora("retrieval", base).unload()
    assert torch.equal(tiny.scores("retrieval", restored, batch), expected)
    assert [n for n, _ in restored.named_modules()] == names
    hooks = [
        hook
        for module in restored.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    assert not [h for h in hooks if "mmadapt" in getattr(h, "__module__", type(h).__module__)]
