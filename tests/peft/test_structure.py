"""What is adapted, what never is, and what is refused."""

import warnings

import pytest
import torch
from peft import PeftConfig, PeftType, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from mmadapt.peft import PillConfig, components
from mmadapt.peft._register import register_tuner


def wrapped(model):
    names = {n.split(".mmadapt_pill_")[0] for n, _ in model.named_parameters() if "mmadapt" in n}
    return sorted(n.removeprefix("base_model.model.") for n in names)


LANGUAGE_MODEL = {
    "llama": "model",
    "blip2": "language_model.model",
    "llava": "model.language_model",
}
PROJECTOR = {
    "llama": [],
    "blip2": ["language_projection"],
    "llava": ["model.multi_modal_projector"],
}


def test_default_targets_are_the_language_model_alone(tiny, kind):
    expected = [
        f"{LANGUAGE_MODEL[kind]}.layers.{i}.{wrapper}"
        for i in range(2)
        for wrapper in ("self_attn", "mlp")
    ]
    assert wrapped(tiny.pill(kind)) == sorted(expected + PROJECTOR[kind])


@pytest.mark.parametrize(
    "options, kept",
    [
        ({"target_modules": r".*layers\.1\..*"}, ["1.mlp", "1.self_attn"]),
        ({"target_modules": ["mlp"]}, ["0.mlp", "1.mlp"]),
        ({"exclude_modules": ["0.self_attn"]}, ["0.mlp", "1.mlp", "1.self_attn"]),
        ({"layers_to_transform": [0]}, ["0.mlp", "0.self_attn"]),
        ({"target_modules": ["self_attn", "q_proj"]}, ["0.self_attn", "1.self_attn"]),
    ],
)
def test_targets_can_be_narrowed(tiny, kind, options, kept):
    model = tiny.pill(kind, **options)
    expected = [f"{LANGUAGE_MODEL[kind]}.layers.{name}" for name in kept]
    assert wrapped(model) == sorted(expected + PROJECTOR[kind])
    batch = tiny.batch(kind)
    output = model(**batch)
    output.loss.backward()
    with model.disable_adapter():
        assert not torch.allclose(model(**batch).logits, output.logits)
    assert not any("vision" in n and "mmadapt" in n for n in wrapped(model))


def test_experts_alone_still_tell_modalities_apart(tiny):
    """Attention is wrapped even where it has no adapter: it carries the ids to the experts."""
    model = tiny.pill("llama", target_modules=["mlp"])
    batch = tiny.batch("llama")
    routed = model(**batch).logits
    batch["modality_ids"] = torch.zeros_like(batch["modality_ids"])
    assert not torch.allclose(model(**batch).logits, routed)


def test_a_second_adapter_may_target_other_modules(tiny):
    model = tiny.pill("llama", target_modules=["mlp"])
    batch = tiny.batch("llama")
    first = model(**batch).logits
    model.add_adapter("other", PillConfig(rank=4, target_modules=["self_attn"], init_weights=False))
    assert torch.equal(model(**batch).logits, first)
    model.set_adapter("other")
    second = model(**batch).logits
    assert not torch.allclose(first, second)
    assert not any(".other" in n and "mlp" in n for n, _ in model.named_parameters())


def test_unknown_architectures_are_refused():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=8))
    with pytest.raises(ValueError, match=r"GPT2.*`self_attn` and `mlp`.*ln_1"):
        get_peft_model(model, PillConfig())
    with pytest.raises(ValueError, match=r"nn\.ModuleList of decoder layers"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), PillConfig())


def test_fused_values_are_refused_by_the_gate_alone(tiny):
    base = tiny.base("llama")
    attention = base.model.layers[0].self_attn
    attention.qkv_proj = attention.v_proj
    del attention.v_proj
    with pytest.raises(ValueError, match=r"layers.0.self_attn.*`v_proj`.*qkv_proj.*gate='none'"):
        tiny.pill("llama", base)
    base = tiny.base("llama")
    base.model.layers[0].self_attn.qkv_proj = base.model.layers[0].self_attn.v_proj
    del base.model.layers[0].self_attn.v_proj
    tiny.pill("llama", base, gate="none")


def test_two_decoder_stacks_are_refused(tiny):
    base = tiny.base("llama")
    base.model.more_layers = nn.ModuleList(list(base.model.layers))
    base.model.more_layers[0] = type(base.model.layers[0])(base.config, 0)
    with pytest.raises(ValueError, match=r"exactly one.*found 2.*more_layers"):
        tiny.pill("llama", base)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "rank is a positive integer, got 0"),
        ({"rank": True}, "rank is a positive integer"),
        ({"gate": "soft"}, r"gate is one of \('token', 'static', 'none'\), got 'soft'"),
        ({"stage": "pretrain"}, "stage is one of"),
        ({"projector": "mlp"}, "projector is one of"),
        ({"experts": 2}, "experts is one of"),
        ({"target_modules": "("}, "target_modules is not a regular expression"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        PillConfig(**options)


def test_impossible_combinations_are_refused(tiny):
    with pytest.raises(ValueError, match=r"projector='linear'.*language_projection"):
        tiny.pill("llama", projector="linear")
    with pytest.raises(ValueError, match="stage='align' trains"):
        tiny.pill("llama", stage="align", experts="shared")
    base = tiny.base("blip2")
    base.language_projection = nn.Identity()
    with pytest.raises(ValueError, match="no linear layer that tells the width"):
        tiny.pill("blip2", base, projector="linear")


@pytest.mark.parametrize("stage", ["align", "instruct"])
@pytest.mark.parametrize(
    "options",
    [
        {"experts": "shared"},
        {"adapter": "linear"},
        {"gate": "none"},
        {"attention_adapter": False},
        {"adapter": "linear", "experts": "shared", "gate": "none", "attention_adapter": False},
    ],
)
def test_ablations_train(tiny, options, stage):
    model = tiny.pill("blip2", stage=stage, **options).train()
    model(**tiny.batch("blip2")).loss.backward()
    grads = tiny.gradients(model)
    assert grads.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert any(grads[name].any() for name in grads)


def test_components_cover_every_parameter_once(tiny, kind):
    for model in (tiny.base(kind), tiny.pill(kind)):
        groups = components(model)
        listed = [name for members in groups.values() for name, _ in members]
        assert sorted(listed) == sorted(name for name, _ in model.named_parameters())
    assert {n for n, members in groups.items() if any(p.requires_grad for _, p in members)} == (
        {"vision_expert", "text_expert", "attention_adapter", "gate"}
        | ({"projector"} if kind != "llama" else set())
    )
    expected = ["vision_expert", "text_expert", "attention_adapter", "gate"]
    if kind != "llama":
        expected = ["projector", *expected, "vision_tower"]
    if kind == "blip2":
        expected.append("qformer")
    assert list(groups) == [*expected, "language_model", "lm_head"]


def llama2_7b():
    with torch.device("meta"):
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32000,
                hidden_size=4096,
                intermediate_size=11008,
                num_hidden_layers=32,
                num_attention_heads=32,
            )
        )


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, 45_088_768),
        ({"gate": "static"}, 40_895_488),
        ({"adapter": "linear"}, 32_505_856),
        ({"stage": "align"}, 15_728_640),
    ],
)
def test_parameter_counts_of_llama_2_7b(options, expected):
    base = llama2_7b()
    base.config.image_token_id = 0
    with torch.device("meta"):
        base.multi_modal_projector = nn.Linear(768, 4096)
        model = get_peft_model(base, PillConfig(rank=32, projector="linear", **options))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == expected


def test_registration_is_idempotent_and_guarded():
    from mmadapt.peft import PillModel

    register_tuner("MMADAPT_PILL", PillConfig, PillModel)
    assert PeftType("MMADAPT_PILL") is PeftType.MMADAPT_PILL
    assert list(PeftType).count("MMADAPT_PILL") == 1
    with pytest.raises(RuntimeError, match="already"):
        register_tuner("MMADAPT_PILL", PillConfig, object)


def test_config_round_trip(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = PillConfig(rank=5, gate="static", target_modules=["mlp"], layers_to_transform=1)
        config.save_pretrained(tmp_path)
        loaded = PeftConfig.from_pretrained(tmp_path)
    assert loaded == config
