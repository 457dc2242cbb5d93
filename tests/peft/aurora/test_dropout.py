"""Branch dropout: where the masks are, that they are independent, and that they are replayed."""

import pytest
import torch

from mmadapt.peft.aurora import branch
from mmadapt.peft.aurora.linear import AuroraLinear

P = 0.1


def layer_of(model, end):
    return next(m for n, m in model.named_modules() if n.endswith(end) and hasattr(m, "modes"))


def masks(tiny, end, rows=64):
    """Keep masks of a layer's branch, read off an output that is the masked core itself.

    The base is zero, factor_out the identity, and the branch without dropout is one everywhere.
    """
    model = tiny.aurora("retrieval", rank=32, branch_dropout=P, core="diagonal", mlp_layout="clean")
    layer, factors = layer_of(model, end), model.base_model.factors["default"]
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        layer.base_layer.bias.zero_()
        factors.factor_out(32).copy_(torch.eye(32))
        factors.factor_in(32).fill_(1 / 32 / (4 if end == "fc2" else 1))
        layer.mode_vectors("default").fill_(1)
    layer.train()
    output = layer(torch.ones(rows, layer.base_layer.in_features))
    kept = output != 0
    torch.testing.assert_close(output[kept], torch.full_like(output[kept], 1 / (1 - P)))
    return kept


@pytest.mark.parametrize("end", ["qkv", "projection", "fc1", "fc2", "attention.self.query"])
def test_rate(tiny, end):
    kept = masks(tiny, end, rows=16384)
    assert kept.float().mean().item() == pytest.approx(1 - P, abs=0.002)


@pytest.mark.parametrize("end", ["qkv", "fc1"])
def test_chunks_are_independent(tiny, end):
    kept = masks(tiny, end, rows=16384).float()
    chunks = torch.stack([c.flatten() for c in kept.split(32, dim=1)])
    assert torch.corrcoef(chunks).fill_diagonal_(0).abs().max() < 0.01


def test_siblings_are_independent(tiny):
    model = tiny.aurora("retrieval", branch_dropout=0.5).train()
    attention = model.get_base_model().text_encoder.encoder.layer[0].attention.self
    query, key = attention.query, attention.key
    with torch.no_grad():
        key.base_layer.weight.copy_(query.base_layer.weight)
        key.base_layer.bias.copy_(query.base_layer.bias)
        key.mode_vectors("default").copy_(query.mode_vectors("default"))
    x = torch.randn(3, 32)
    assert not torch.equal(query(x), key(x))
    model.eval()
    torch.testing.assert_close(query(x), key(x))


def in_plain_torch(layer, x, keep):
    """Update of one weight with given keep masks, as published."""
    factors = layer.shared.factors["default"]
    u, v = (f(w) for f, w in zip((factors.factor_in, factors.factor_out), (32, 32), strict=True))
    modes = torch.einsum("abr,kr->kab", factors.core, layer.mode_vectors("default"))
    if layer.site.dropout_at == "before":
        core = (x @ u.t() * keep[0]) @ modes[0]
        return layer.base_layer(x) + core @ v.t()
    cores = [x @ u.t() @ mode * mask for mode, mask in zip(modes, keep, strict=True)]
    return layer.base_layer(x) + torch.cat([core @ v.t() for core in cores], dim=-1)


def in_parts(layer):
    return lambda x: branch.add_update(layer, layer.base_layer(x), x, "default")


@pytest.mark.parametrize(
    "end", ["qkv", "projection", "attention.self.value", "crossattention.self.key"]
)
@pytest.mark.parametrize("operator", [True, False])
def test_given_masks(tiny, end, operator, monkeypatch):
    """The operator, and plain torch, with the masks that the published formula is given."""
    from mmadapt.ops._backends.reference import cp_linear

    model = tiny.aurora("retrieval", branch_dropout=0.3)
    layer = layer_of(model, f"layer.0.{end}" if "attention." in end else end).train()
    layer.siblings = None
    x = torch.randn(5, 32, requires_grad=True)
    keep = [(torch.rand(5, 8) > 0.3) / 0.7 for _ in range(layer.site.chunks)]
    monkeypatch.setattr(cp_linear, "_drop", lambda seeds, k, z, p: keep[k].to(z.dtype))
    rest = iter(keep)
    monkeypatch.setattr(
        branch.F, "dropout", lambda t, p, active: t * next(rest) if active and p else t
    )
    leaves = [x, layer.mode_vectors("default"), *layer.shared.factors["default"].parameters()]
    monkeypatch.setenv("MMADAPT_BACKEND", "reference")
    run = layer if operator else in_parts(layer)
    found = run(x)
    expected = in_plain_torch(layer, x, keep)
    assert (found - expected).norm() / expected.norm() <= 2e-6
    dy = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(found, leaves, dy),
        torch.autograd.grad(expected, leaves, dy),
        strict=True,
    ):
        assert (a - b).norm() / b.norm() <= 1e-5


def test_none_in_evaluation(tiny, kind):
    model, batch = tiny.aurora(kind, branch_dropout=0.5), tiny.batch(kind)
    first = tiny.scores(kind, model, batch)
    assert torch.equal(tiny.scores(kind, model, batch), first)
    assert not torch.equal(tiny.scores(kind, model.train(), batch), first)


def test_position(tiny):
    """After the mode in vision transformers, before it in text models."""
    for kind in ("retrieval", "llama"):
        for layer in tiny.aurora(kind).modules():
            if isinstance(layer, AuroraLinear):
                after = "vision_model" in layer.path
                assert layer.site.dropout_at == ("after" if after else "before")


def test_rate_is_told(tiny):
    """What a training loop asks that wants to share the outputs of a layer."""
    layer = layer_of(tiny.aurora("retrieval", branch_dropout=0.3), "qkv")
    assert layer.branch_dropout == 0.0
    assert layer.train().branch_dropout == 0.3
    layer.enable_adapters(False)
    assert layer.branch_dropout == 0.0
