"""Merged weights: what they compute, what rounding takes, and the way back."""

import copy
import warnings

import pytest
import torch


def weights(model):
    return {
        n.replace("base_layer.", ""): p.detach().clone()
        for n, p in model.get_base_model().named_parameters()
        if "mmadapt" not in n
    }


@pytest.mark.parametrize(
    "core, layout", [("dense", "released"), ("dense", "clean"), ("diagonal", "clean")]
)
def test_scores_are_the_same(tiny, kind, core, layout):
    model = tiny.aurora(kind, core=core, mlp_layout=layout)
    batch = tiny.batch(kind, rows=64)
    before, stored = tiny.scores(kind, model, batch), weights(model)
    assert 0 < model.base_model.merge_error(**batch) <= 1e-5
    model.merge_adapter()
    merged = tiny.scores(kind, model, batch)
    assert (merged - before).norm() / before.norm() <= 1e-5
    assert any(not torch.equal(w, stored[n]) for n, w in weights(model).items())
    model.unmerge_adapter()
    assert all(torch.equal(w, stored[n]) for n, w in weights(model).items())
    assert torch.equal(tiny.scores(kind, model, batch), before)


def test_merged_is_not_added_again(tiny):
    model, batch = tiny.aurora("llama"), tiny.batch("llama")
    base = tiny.scores("llama", tiny.base("llama"), batch)
    model.merge_adapter()
    with model.disable_adapter():  # unmerges
        assert torch.equal(tiny.scores("llama", model, batch), base)


@pytest.mark.parametrize("core, safe", [("dense", False), ("diagonal", True)])
def test_merge_and_unload(tiny, core, safe):
    for kind in ("retrieval", "vqa", "llama", "llava"):
        model, batch = tiny.aurora(kind, core=core, gqt=False), tiny.batch(kind)
        before = tiny.scores(kind, model, batch)
        plain = model.merge_and_unload(safe_merge=safe)
        assert not [n for n, _ in plain.named_parameters() if "mmadapt" in n]
        after = tiny.scores(kind, plain, batch)
        assert (after - before).norm() / before.norm() <= 1e-5


def test_the_query_transformation_cannot_be_merged_away(tiny):
    model, batch = tiny.aurora("retrieval"), tiny.batch("retrieval")
    before = tiny.scores("retrieval", model, batch)
    with pytest.raises(NotImplementedError, match=r"query transformation.*merge_adapter"):
        model.merge_and_unload()
    torch.testing.assert_close(tiny.scores("retrieval", model, batch), before)


def test_rounding_is_told(tiny):
    """A small update is mostly lost in bf16; the same merge in fp32 is silent."""

    def small(dtype):
        model = tiny.aurora("llama", tiny.base("llama", dtype=dtype))
        with torch.no_grad():
            model.base_model.factors["default"].factor_out_32.mul_(0.02)
        return model

    with pytest.warns(UserWarning, match=r"bfloat16 weights rounds away .* \d+ % on average"):
        small(torch.bfloat16).merge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        small(torch.float32).merge_adapter()


def test_rounding_loss_is_measured_on_the_weights(tiny):
    model = tiny.aurora("llama", tiny.base("llama", dtype=torch.bfloat16))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    before, update = layer.base_layer.weight.clone(), layer.get_delta_weight("default")
    assert update.dtype == torch.float32
    layer.merge()
    lost = (layer.base_layer.weight.float() - (before.float() + update)).norm() / update.norm()
    assert layer.rounding_loss() == pytest.approx(lost.item(), rel=1e-5)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before) and layer.rounding_loss() == 0


def test_several_adapters_merge_without_rounding_twice(tiny):
    model = tiny.aurora("llama", tiny.base("llama", dtype=torch.bfloat16))
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    exact = layer.base_layer.weight.float()
    exact = exact + layer.get_delta_weight("default") + layer.get_delta_weight("other")
    layer.merge(adapter_names=["default"])
    layer.merge(adapter_names=["other"])
    assert torch.equal(layer.base_layer.weight, exact.bfloat16())
    assert layer.merged_adapters == ["default", "other"]


def test_safe_merge_refuses_what_is_not_finite(tiny):
    model = tiny.aurora("llama")
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    before = layer.base_layer.weight.clone()
    with torch.no_grad():
        layer.mode_vectors("default").fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)


def test_merge_error_wants_unmerged_weights(tiny):
    model, batch = tiny.aurora("llama"), tiny.batch("llama")
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.base_model.merge_error(**batch)
