"""Adapters on and off, several of them, added, deleted, unloaded and copied."""

import copy
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model

from mmadapt.peft import AuroraConfig


def other_config(**options):
    return AuroraConfig(rank=4, branch_dropout=0.0, init_weights=False, **options)


def test_disabled_is_the_base_model_bitwise(tiny, kind):
    base, batch = tiny.base(kind), tiny.batch(kind)
    expected = tiny.scores(kind, base, batch)
    model = tiny.aurora(kind, base)
    adapted = tiny.scores(kind, model, batch)
    with model.disable_adapter():
        assert torch.equal(tiny.scores(kind, model, batch), expected)
        assert not any(p.requires_grad for p in model.parameters())
    assert not torch.allclose(adapted, expected)
    assert torch.equal(tiny.scores(kind, model, batch), adapted)
    assert any(p.requires_grad for p in model.base_model.factors.parameters())


def test_unload_restores_the_base_model(tiny, kind):
    base, batch = tiny.base(kind), tiny.batch(kind)
    expected, names = tiny.scores(kind, base, batch), [n for n, _ in base.named_modules()]
    restored = tiny.aurora(kind, base).unload()
    assert torch.equal(tiny.scores(kind, restored, batch), expected)
    assert [n for n, _ in restored.named_modules()] == names
    again = tiny.aurora(kind, restored)
    assert not torch.allclose(tiny.scores(kind, again, batch), expected)


def test_several_adapters(tiny, kind):
    model, batch = tiny.aurora(kind), tiny.batch(kind)
    first = tiny.scores(kind, model, batch)
    model.add_adapter("other", other_config(core="diagonal", gqt=False))
    assert torch.equal(tiny.scores(kind, model.eval(), batch), first)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".other" in n)
    assert all(p.requires_grad for n, p in model.named_parameters() if ".default" in n)
    model.set_adapter("other")
    second = tiny.scores(kind, model, batch)
    assert not torch.allclose(first, second)
    assert all(p.requires_grad for n, p in model.named_parameters() if ".other" in n)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".default" in n)
    with pytest.warns(UserWarning, match="other was active"):
        model.delete_adapter("other")
    assert not any(".other" in n for n, _ in model.named_parameters())
    model.set_adapter("default")
    assert torch.equal(tiny.scores(kind, model, batch), first)
    tiny.loss(kind, model.train(), batch).backward()
    assert model.base_model.factors["default"].core.grad.any()


def test_two_at_once_add_up(tiny, core):
    """The sum of two updates, as merged weights have it."""
    batch = tiny.batch("retrieval")
    model = tiny.aurora("retrieval", core=core)
    model.add_adapter("other", other_config(scale=0.5))
    model.base_model.set_adapter(["default", "other"])
    both = tiny.scores("retrieval", model, batch)
    model.base_model.merge_adapter()
    torch.testing.assert_close(tiny.scores("retrieval", model, batch), both, rtol=1e-5, atol=1e-5)
    model.base_model.unmerge_adapter()
    (tiny.loss("retrieval", model, batch)).backward()
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad.any(), name


def test_set_requires_grad(tiny):
    model = tiny.aurora("llama")
    model.set_requires_grad("default", False)
    assert not any(p.requires_grad for p in model.parameters())
    model.set_requires_grad("default")
    assert all(p.requires_grad for n, p in model.named_parameters() if "mmadapt" in n)


def test_mixed_batches_are_refused(tiny):
    with pytest.raises(ValueError, match="adapter_names"):
        tiny.aurora("llama")(**tiny.batch("llama"), adapter_names=["default", "other"])


def test_injection_without_a_peft_model_is_refused(tiny):
    with pytest.raises(ValueError, match="shared state"):
        inject_adapter_in_model(AuroraConfig(), tiny.base("llama"))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_clones_are_independent(tiny, kind, clone):
    model, batch = tiny.aurora(kind), tiny.batch(kind)
    other = clone(model)  # before any forward pass: transformers then adds hooks it cannot pickle
    expected = tiny.scores(kind, model, batch)
    assert torch.equal(tiny.scores(kind, other, batch), expected)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "mmadapt_aurora_" in name:
                parameter.mul_(-2)
    assert not torch.allclose(tiny.scores(kind, other, batch), expected)
    assert torch.equal(tiny.scores(kind, model, batch), expected)
    mine = {id(p) for p in model.parameters()}
    assert not any(id(p) in mine for p in other.parameters())


def test_copies_after_training_steps(tiny, kind):
    model, batch = tiny.aurora(kind).train(), tiny.batch(kind)
    tiny.loss(kind, model, batch).backward()
    other = copy.deepcopy(model)
    assert torch.equal(tiny.scores(kind, other, batch), tiny.scores(kind, model, batch))


def test_moving_the_model_moves_the_factors(tiny):
    model, batch = tiny.aurora("llama"), tiny.batch("llama")
    expected = tiny.scores("llama", model, batch)
    double = tiny.scores("llama", model.double(), batch)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    torch.testing.assert_close(double.float(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"components": ["language_model"]}, r"has no \['language_model'\].*vit_qkv.*cross"),
        ({"rank": 6}, "rank=6 is not divisible by 4"),
        ({"target_modules": ["layer_norm1"]}, "is a LayerNorm; Aurora adapts torch.nn.Linear"),
        ({"target_modules": ["nothing"]}, "not found|No modules"),
    ],
)
def test_what_does_not_fit_is_refused(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(tiny.base("retrieval"), AuroraConfig(**{"rank": 8} | options))


def test_an_ffn_that_is_no_multiple_of_the_width_is_refused(tiny):
    base = tiny.base("retrieval", hidden=48)
    with pytest.raises(ValueError, match=r"maps 32 to 48 features.*vit_mlp"):
        get_peft_model(base, AuroraConfig(rank=8))
    parts = ["vit_qkv", "text_self"]
    assert get_peft_model(tiny.base("retrieval", hidden=48), AuroraConfig(components=parts))


def test_models_without_a_known_part_want_target_modules():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(model, AuroraConfig(rank=4))
    tuned = get_peft_model(model, AuroraConfig(rank=4, target_modules=["0", "2"]))
    assert isinstance(tuned, PeftModel)
    assert tuned(torch.randn(2, 4)).shape == (2, 3)
    shapes = {n for n, _ in tuned.base_model.factors["default"].named_parameters()}
    assert shapes == {"core", "factor_in_4", "factor_out_4", "factor_out_3"}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"core": "cp"}, "core is one of"),
        ({"mlp_layout": "x"}, "mlp_layout is one of"),
        ({"rank": 0}, "rank is a positive integer"),
        ({"rank": True}, "rank is a positive integer"),
        ({"branch_dropout": 1.0}, r"branch_dropout lies in \[0, 1\)"),
        ({"components": ["vit"]}, "components is None or a list"),
        ({"components": []}, "components is None or a list"),
        ({"components": "cross"}, "components is None or a list"),
        ({"target_modules": "("}, "target_modules is not a regular expression"),
        ({"layers_pattern": "layers"}, "layers_pattern needs layers_to_transform"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        AuroraConfig(**options)


def test_exclusion_and_narrowing(tiny):
    def adapted(**options):
        model = tiny.aurora("llava", **options)
        return {layer.path for layer in model.base_model._shared.layers}

    everything = adapted()
    assert len(everything) == 8
    assert not any("vision" in path for path in everything)
    assert adapted(layers_to_transform=1) == {p for p in everything if ".1." in p}
    assert adapted(exclude_modules=["o_proj"]) == {p for p in everything if "o_proj" not in p}
    assert adapted(target_modules=["q_proj"], exclude_modules=".*vision.*") == {
        p for p in everything if "q_proj" in p
    }
    assert any("vision" in path for path in adapted(target_modules=["q_proj"]))


def test_the_vision_tower_of_blip2_has_to_be_named(tiny):
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    def base():
        tower = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        return Blip2ForConditionalGeneration(
            Blip2Config(
                vision_config=tower | {"intermediate_size": 64, "image_size": 8, "patch_size": 4},
                qformer_config=tower | {"intermediate_size": 24, "encoder_hidden_size": 16},
                text_config=tiny.base("llama").config.to_dict(),
                num_query_tokens=4,
                image_token_id=3,
            )
        ).eval()

    ids = torch.tensor([[3, 3, 3, 3, 5, 6]])
    batch = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 8, 8)}
    adapted = {}
    for components in (None, ["vit_qkv", "vit_proj", "vit_mlp", "language_model"]):
        torch.manual_seed(0)
        model = tiny.aurora("blip2", base(), components=components)
        paths = {layer.path for layer in model.base_model._shared.layers}
        adapted[str(components)] = {path.split(".")[0] for path in paths}
        assert model.base_model.merge_error(**batch) <= 1e-5
        with model.disable_adapter(), torch.no_grad():
            plain = model(**batch).logits
        assert not torch.allclose(model(**batch).logits, plain)
    assert list(adapted.values()) == [{"language_model"}, {"language_model", "vision_model"}]
