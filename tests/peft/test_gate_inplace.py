"""The gate overwrites the values that `v_proj` has just made, unless somebody may want them."""

import functools

import pytest
import torch
from torch import nn
from torch.utils import checkpoint

from mmadapt import ops


@pytest.fixture
def overwritten(monkeypatch):
    """For every call of a gate: whether it returned the tensor that it was given."""
    calls = []

    def spied(gate):
        @functools.wraps(gate)
        def call(values, *args, **kwargs):
            out = gate(values, *args, **kwargs)
            calls.append(out.data_ptr() == values.data_ptr())
            return out

        return call

    for name in ("modality_gate", "projected_modality_gate"):
        monkeypatch.setattr(ops, name, spied(getattr(ops, name)))
    return calls


def values_of(model, index=0):
    return model.get_base_model().model.layers[index].self_attn.v_proj


def watch(model, **options):
    """What a hook on every layer's `v_proj` gets, and a copy of it."""
    kept = []
    for index in range(2):
        values_of(model, index).register_forward_hook(
            lambda module, args, output: kept.append((output, output.clone())), **options
        )
    return kept


def step(tiny, model, batch):
    model.zero_grad()
    output = model.train()(**batch)
    output.loss.backward()
    return output.logits.detach(), tiny.gradients(model)


@pytest.mark.parametrize("gate", ["token", "static"])
@pytest.mark.parametrize("attention_adapter", [True, False])
def test_same_numbers(tiny, overwritten, gate, attention_adapter):
    """Without the attention adapter the first layer's values do not even need a gradient."""
    batch = tiny.batch("llama", images=(True, False))
    options = {"gate": gate, "attention_adapter": attention_adapter}
    model, other = (tiny.pill("llama", **options) for _ in range(2))
    watch(other, prepend=True)
    (logits, grads), (expected, wanted) = step(tiny, model, batch), step(tiny, other, batch)
    assert overwritten == [True] * 2 + [False] * 2
    assert torch.equal(logits, expected) and grads.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(grads[name], wanted[name], rtol=1e-6, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, expected)
    with torch.inference_mode():
        torch.testing.assert_close(model(**batch).logits, expected)
    assert overwritten[4:] == [True] * 4


def test_hooks_keep_what_they_saw(tiny, overwritten):
    batch = tiny.batch("llama")
    model = tiny.pill("llama")
    before, behind = watch(model, prepend=True), watch(model)
    model(**batch)
    image = batch["modality_ids"].bool()
    assert overwritten == [False] * 2
    for (ungated, seen), (gated, seen_too) in zip(before, behind, strict=True):
        assert torch.equal(ungated, seen) and torch.equal(gated, seen_too)
        assert torch.equal(ungated[~image], gated[~image])
        assert not torch.allclose(ungated[image], gated[image])


def test_repeated_values_and_other_modules_are_copied(tiny, overwritten):
    batch = tiny.batch("llama")
    with pytest.warns(UserWarning, match="repeats keys"):
        repeated = tiny.pill("llama", gate_heads="q")
    repeated(**batch)

    class Kept(nn.Module):
        """Returns the same tensor again."""

        def __init__(self, linear):
            super().__init__()
            self.linear, self.out_features, self.kept = linear, linear.out_features, None

        def forward(self, x):
            self.kept = self.linear(x) if self.kept is None else self.kept
            return self.kept

    base = tiny.base("llama")
    for layer in base.model.layers:
        layer.self_attn.v_proj = Kept(layer.self_attn.v_proj)
    model = tiny.pill("llama", base)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, model(**batch).logits)
    assert overwritten == [False] * 6


def test_selective_checkpointing(tiny, overwritten):
    """Its cache holds the output of `v_proj`, which must not change before it is read again."""
    batch = tiny.batch("llama")
    plain, model = tiny.pill("llama"), tiny.pill("llama")
    save = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    context = functools.partial(checkpoint.create_selective_checkpoint_contexts, save)
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": context})
    expected, found = step(tiny, plain, batch), step(tiny, model, batch)
    assert torch.equal(found[0], expected[0]) and overwritten[:2] == [True] * 2
    assert len(overwritten) >= 6 and not any(overwritten[2:])
    for name in expected[1]:
        torch.testing.assert_close(found[1][name], expected[1][name], rtol=1e-5, atol=1e-7)
