"""What all layers attend to is projected onto the shared factor once."""

import pytest
import torch
from torch.nn import functional as F

from mmadapt.peft.aurora import branch, image_states
from mmadapt.peft.aurora.linear import AuroraLinear


@pytest.fixture
def projections(monkeypatch):
    """Shapes of what is projected onto the shared factor, outside of operators."""
    shapes = []
    linear = F.linear

    class Counting:
        @staticmethod
        def linear(x, weight, bias=None):
            shapes.append(tuple(x.shape))
            return linear(x, weight, bias)

        dropout = staticmethod(F.dropout)

    monkeypatch.setattr(image_states, "F", Counting)
    monkeypatch.setattr(branch, "F", Counting)
    return shapes


def without_sharing(model):
    for hook in model.base_model._hooks:
        hook.remove()
    return model


@pytest.mark.parametrize("kind", ["retrieval", "vqa"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_once_per_stack(tiny, kind, mode, projections):
    batch = tiny.batch(kind)
    model = tiny.aurora(kind)
    if mode == "train":
        tiny.loss(kind, model.train(), batch).backward()
    else:
        tiny.scores(kind, model, batch)
    image, question = (2, 5, 32), (2, 7, 32)
    assert projections == ([image] if kind == "retrieval" else [image, question])


@pytest.mark.parametrize("kind", ["retrieval", "vqa"])
def test_it_equals_recomputation(tiny, kind, core):
    config = {"core": core, "scale": 0.7, "mlp_layout": "clean"}
    batch = tiny.batch(kind, dtype=torch.float64)
    results = []
    for share in (True, False):
        base = tiny.base(kind, dtype=torch.float64)
        model = tiny.aurora(kind, base, **config).double()
        loss = tiny.loss(kind, model if share else without_sharing(model), batch)
        loss.backward()
        results.append({"loss": loss.detach()} | tiny.gradients(model))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-11, atol=1e-13, msg=name)


def test_gradients_reach_the_states(tiny):
    model = tiny.aurora("retrieval", tiny.base("retrieval", dtype=torch.float64)).double()
    text = model.get_base_model().text_encoder
    ids = torch.ones(2, 4, dtype=torch.int64)
    states = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    grads = []
    for _ in range(2):
        output = text(ids, encoder_hidden_states=states).last_hidden_state
        grads += torch.autograd.grad(output.square().sum(), states)
        without_sharing(model)
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-13)


def test_keys_that_are_cached_are_not_projected(tiny, projections):
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    model = tiny.aurora("retrieval")
    text = model.get_base_model().text_encoder
    ids, states = torch.ones(2, 4, dtype=torch.int64), torch.randn(2, 5, 32)
    with torch.no_grad():
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        expected = text(ids, encoder_hidden_states=states, past_key_values=cache)
        assert len(projections) == 1
        # Cross-attention alone from the cache, for another pass over the same images.
        again = EncoderDecoderCache(DynamicCache(), cache.cross_attention_cache)
        found = text(ids, encoder_hidden_states=states * 0, past_key_values=again)
    assert len(projections) == 1
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state)


def test_nothing_is_shared_where_nothing_is_adapted(tiny, projections):
    for config in ({"components": ["text_self", "vit_qkv"]}, {"target_modules": ["query"]}):
        model = tiny.aurora("retrieval", **config)
        tiny.scores("retrieval", model, tiny.batch("retrieval"))
    model = tiny.aurora("retrieval")
    with model.disable_adapter():
        tiny.scores("retrieval", model, tiny.batch("retrieval"))
    model.merge_adapter()
    tiny.scores("retrieval", model, tiny.batch("retrieval"))
    assert projections == []


def test_each_distinct_input_is_projected_once(tiny, monkeypatch):
    """q, k and v of one attention run as one operator, whatever their number of calls."""
    calls = []
    group = branch.ops.cp_linear_group

    def counting(x, weights, *args, **kwargs):
        calls.append(len(weights))
        return group(x, weights, *args, **kwargs)

    monkeypatch.setattr(branch.ops, "cp_linear_group", counting)
    for kind, expected in (("retrieval", [1] * 8 + [3, 1] * 2), ("llama", [1, 2, 1] * 2)):
        calls.clear()
        tiny.scores(kind, tiny.aurora(kind), tiny.batch(kind))
        # LLaMA has fewer key heads here: q alone, k and v together, and the output projection.
        # BLIP: four weights in a vision layer, text self-attention, queries of cross-attention.
        assert calls == expected


@pytest.mark.parametrize(
    "change",
    [
        lambda x, key: x.add_(1),
        lambda x, key: key.mode_vectors("default").mul_(2),
        lambda x, key: key.base_layer.weight.mul_(2),
        lambda x, key: key.shared.factors["default"].factor_out_32.mul_(2),
        lambda x, key: key.train(),
    ],
)
def test_what_is_kept_for_a_sibling_is_never_old(tiny, change):
    model = tiny.aurora("retrieval", branch_dropout=0.5)
    attention = model.get_base_model().text_encoder.encoder.layer[0].attention.self
    query, key = attention.query, attention.key
    x = torch.randn(3, 32)
    with torch.no_grad():
        query(x)
        change(x, key)
        torch.manual_seed(1)
        found = key(x)
        key.siblings = None
        torch.manual_seed(1)
        assert torch.equal(found, key(x)) or key.training
        if key.training:
            assert not torch.allclose(found, key.eval()(x))


def test_kept_outputs_are_given_out_once(tiny):
    model = tiny.aurora("retrieval")
    attention = model.get_base_model().text_encoder.encoder.layer[0].attention.self
    x = torch.randn(3, 32)
    siblings = attention.query.siblings
    assert all(isinstance(member, AuroraLinear) for member in siblings.members)
    attention.query(x)
    assert len(siblings._kept) == 2
    first = attention.key(x)
    attention.value(x)
    assert not siblings._kept
    assert attention.key(x) is not first
