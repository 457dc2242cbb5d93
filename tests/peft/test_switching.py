"""Adapters on and off, several of them, added, deleted and unloaded."""

import copy
import pickle

import pytest
import torch

from mmadapt.peft import PillConfig, set_stage


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def test_disabled_is_the_base_model_bitwise(tiny, kind):
    batch = tiny.batch(kind)
    base = tiny.base(kind)
    inputs = {k: v for k, v in batch.items() if k != "modality_ids"}
    expected = logits(base, inputs)
    model = tiny.pill(kind, base)
    adapted = logits(model, batch)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), expected)
    assert not torch.allclose(adapted, expected)
    assert torch.equal(logits(model, batch), adapted)


@pytest.mark.parametrize("fuse_norms", [False, True])
def test_fresh_adapter_leaves_text_alone(tiny, kind, fuse_norms):
    batch = tiny.batch(kind, images=(False, False))
    base = tiny.base(kind)
    expected = logits(base, {k: v for k, v in batch.items() if k != "modality_ids"})
    model = tiny.pill(kind, base, init_weights=True, projector="frozen", fuse_norms=fuse_norms)
    found = logits(model, batch)
    if fuse_norms:  # a backend's norm may add its squares in another order
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(found, expected)


def test_unload_restores_the_base_model(tiny, kind):
    batch = tiny.batch(kind)
    inputs = {k: v for k, v in batch.items() if k != "modality_ids"}
    base = tiny.base(kind)
    expected, names = logits(base, inputs), [n for n, _ in base.named_modules()]
    restored = tiny.pill(kind, base).unload()
    assert torch.equal(logits(restored, inputs), expected)
    assert [n for n, _ in restored.named_modules()] == names
    hooks = [
        getattr(hook, "__module__", type(hook).__module__)
        for module in restored.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    assert not [name for name in hooks if name.startswith("mmadapt")]
    again = tiny.pill(kind, restored)
    assert not torch.allclose(logits(again, batch), expected)


def test_several_adapters(tiny, kind):
    batch = tiny.batch(kind)
    model = tiny.pill(kind)
    first = logits(model, batch)
    model.add_adapter("other", PillConfig(rank=3, gate="static", init_weights=False))
    assert torch.equal(logits(model, batch), first)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".other" in n)
    model.set_adapter("other")
    second = logits(model, batch)
    assert not torch.allclose(first, second)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".default" in n)
    model.delete_adapter("other")
    model.set_adapter("default")
    assert torch.equal(logits(model, batch), first)


def test_only_one_adapter_at_a_time(tiny):
    model = tiny.pill("llama")
    model.add_adapter("other", PillConfig(rank=3))
    with pytest.raises(ValueError, match=r"one adapter at a time.*default.*other"):
        model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="adapter_names"):
        model(**tiny.batch("llama"), adapter_names=["default", "other"])


def test_merging_is_refused(tiny):
    model = tiny.pill("llama")
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(NotImplementedError, match="save_pretrained"):
            merge()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_clones_are_independent(tiny, kind, clone):
    batch = tiny.batch(kind)
    model = tiny.pill(kind)
    other = clone(model)  # before any forward pass: transformers then adds hooks it cannot pickle
    expected = logits(model, batch)
    assert torch.equal(logits(other, batch), expected)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "mmadapt_pill_" in name:
                parameter.mul_(-2)
    assert not torch.allclose(logits(other, batch), expected)
    assert torch.equal(logits(model, batch), expected)
    with other.disable_adapter():
        assert torch.equal(logits(model, batch), expected)


def test_a_stage_that_would_train_nothing_is_refused(tiny):
    model = tiny.pill("llama", experts="shared", projector=None)
    with pytest.raises(ValueError, match="stage='align' trains vision experts and projector"):
        set_stage(model, "align")
