"""Adapter checkpoints: what is in them, and loading them by every road."""

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from mmadapt.peft import AuroraConfig, aurora_from_released, aurora_to_released

FILE = "adapter_model.safetensors"
HEADS = ["vision_proj", "itm_head"]


def heads(kind):
    return {"modules_to_save": HEADS} if kind == "retrieval" else {}


@pytest.mark.parametrize(
    "core, low_memory", [("dense", False), ("dense", True), ("diagonal", False)]
)
def test_save_and_load(tiny, kind, core, low_memory, tmp_path):
    batch = tiny.batch(kind)
    model = tiny.aurora(kind, core=core, **heads(kind))
    if kind == "retrieval":
        with torch.no_grad():
            model.get_base_model().itm_head.modules_to_save["default"].weight.add_(0.1)
    expected = tiny.scores(kind, model, batch)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.base(kind), tmp_path, low_cpu_mem_usage=low_memory)
    # Tensors of a file have another alignment, and so sums in another order.
    close = {"rtol": 1e-5, "atol": 1e-6} if low_memory else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(tiny.scores(kind, loaded, batch), expected, **close)
    assert not any(p.requires_grad or p.is_meta for p in loaded.parameters())
    renamed = PeftModel.from_pretrained(tiny.base(kind), tmp_path, adapter_name="other")
    assert torch.equal(tiny.scores(kind, renamed, batch), expected)
    trained = PeftModel.from_pretrained(tiny.base(kind), tmp_path, is_trainable=True)
    names = {n for n, p in trained.named_parameters() if p.requires_grad}
    assert names == {n for n, p in model.named_parameters() if p.requires_grad}


def test_a_half_precision_model_keeps_fp32_adapters(tiny, tmp_path):
    batch = tiny.batch("llama")
    model = tiny.aurora("llama", tiny.base("llama", dtype=torch.bfloat16))
    assert {p.dtype for n, p in model.named_parameters() if "mmadapt" in n} == {torch.float32}
    expected = tiny.scores("llama", model, batch)
    model.save_pretrained(tmp_path)
    for low_memory in (False, True):
        base = tiny.base("llama", dtype=torch.bfloat16)
        loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_memory)
        assert {p.dtype for n, p in loaded.named_parameters() if "mmadapt" in n} == {torch.float32}
        assert torch.equal(tiny.scores("llama", loaded, batch), expected)


def test_shared_factors_are_saved_once(tiny, tmp_path):
    model = tiny.aurora("retrieval", modules_to_save=HEADS)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / FILE)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(t.numel() for t in saved.values()) == trained
    shared = sorted(key for key in saved if "factors" in key)
    where = "base_model.mmadapt_aurora_factors."
    assert shared == [where + name for name in ("core", "factor_in_32", "factor_out_32")]
    assert all("mmadapt_aurora_" in key or key.split(".")[2] in HEADS for key in saved)
    assert not any(".default" in key for key in saved)
    assert [n for n, _ in model.named_parameters(remove_duplicate=False) if "factor_in" in n] == [
        "base_model.mmadapt_aurora_factors.default.factor_in_32"
    ]


def test_second_adapter_is_loaded_beside_the_first(tiny, kind, tmp_path):
    batch = tiny.batch(kind)
    other = tiny.aurora(kind, seed=9, rank=4, core="diagonal", gqt=False)
    expected = tiny.scores(kind, other, batch)
    other.save_pretrained(tmp_path)
    model = tiny.aurora(kind)
    first = tiny.scores(kind, model, batch)
    model.load_adapter(tmp_path, "other", is_trainable=True)
    model.set_adapter("other")
    assert torch.equal(tiny.scores(kind, model.eval(), batch), expected)
    assert all(p.requires_grad for n, p in model.named_parameters() if ".other" in n)
    model.set_adapter("default")
    assert torch.equal(tiny.scores(kind, model, batch), first)


def test_the_configuration_comes_back(tiny, tmp_path):
    options = {"rank": 4, "core": "diagonal", "components": ["vit_mlp", "cross"], "scale": 0.5}
    tiny.aurora("retrieval", mlp_layout="released", **options).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, AuroraConfig) and config.layout == "released"
    assert {name: getattr(config, name) for name in options} == options


@pytest.mark.parametrize("part", ["factor_in", "core", "aurora_mode", "scale_self"])
def test_incomplete_checkpoints_are_refused(tiny, part, tmp_path):
    tiny.aurora("retrieval").save_pretrained(tmp_path)
    weights = load_file(tmp_path / FILE)
    lost = next(key for key in weights if part in key)
    save_file({k: v for k, v in weights.items() if k != lost}, tmp_path / FILE)
    with pytest.raises(ValueError, match=rf"1 keys are missing .*{part}"):
        PeftModel.from_pretrained(tiny.base("retrieval"), tmp_path)


def test_renamed_modules_are_refused(tiny, tmp_path):
    tiny.aurora("llava").save_pretrained(tmp_path)
    weights = load_file(tmp_path / FILE)
    save_file({k.replace("language_model", "lm"): v for k, v in weights.items()}, tmp_path / FILE)
    with pytest.raises(ValueError, match="does not fit the model"):
        PeftModel.from_pretrained(tiny.base("llava"), tmp_path)


def test_another_width_is_refused(tiny, tmp_path):
    tiny.aurora("retrieval").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="factor_in_16"):
        PeftModel.from_pretrained(tiny.base("retrieval", dim=16), tmp_path)


def test_state_dict_round_trip(tiny, kind):
    batch = tiny.batch(kind)
    model, other = tiny.aurora(kind), tiny.aurora(kind, seed=8)
    before = tiny.scores(kind, other, batch)
    assert not torch.equal(tiny.scores(kind, model, batch), before)
    result = set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert not result.unexpected_keys
    assert torch.equal(tiny.scores(kind, model, batch), tiny.scores(kind, other, batch))


def test_base_weights_load_without_adapter_keys(tiny):
    model = tiny.aurora("llama")
    weights = {k: v for k, v in model.state_dict().items() if "mmadapt_aurora_" not in k}
    assert model.load_state_dict(weights, strict=False).unexpected_keys == []


@pytest.mark.parametrize("kind", ["retrieval", "vqa"])
def test_released_names_round_trip(tiny, kind):
    model, batch = tiny.aurora(kind, **heads(kind)), tiny.batch(kind)
    released = aurora_to_released(get_peft_model_state_dict(model))
    assert {"CP_U.weight", "CP_V.weight", "CP_C"} < released.keys()
    assert released["visual_encoder.blocks.1.attn.CP_attention"].shape == (8, 4)
    assert released["visual_encoder.blocks.0.mlp.mlp_CP"].shape == (8, 8)
    assert released["text_encoder.encoder.layer.0.crossattention.self.q_CP"].shape == (8, 1)
    assert ("text_decoder.bert.encoder.layer.1.CP_shiftcross" in released) == (kind == "vqa")
    other = tiny.aurora(kind, seed=8, **heads(kind))
    # What a released checkpoint holds besides: frozen weights, momentum copies, other heads.
    extra = {"visual_encoder.blocks.0.attn.qkv.weight": torch.ones(1), "temp": torch.ones(1)}
    extra |= {"visual_encoder_m.blocks.0.attn.CP_attention": torch.ones(8, 4)}
    weights = aurora_from_released({f"module.{k}": v for k, v in (released | extra).items()}, other)
    assert not set_peft_model_state_dict(other, weights).unexpected_keys
    assert torch.equal(tiny.scores(kind, model, batch), tiny.scores(kind, other, batch))


def test_what_has_no_released_name_is_refused(tiny):
    diagonal = get_peft_model_state_dict(tiny.aurora("retrieval", core="diagonal"))
    with pytest.raises(ValueError, match=r"core.* has no counterpart"):
        aurora_to_released(diagonal)
    with pytest.raises(ValueError, match=r"q_proj.* has no counterpart"):
        aurora_to_released(get_peft_model_state_dict(tiny.aurora("llama")))
    model = tiny.aurora("retrieval", components=["vit_qkv"])
    with pytest.raises(ValueError, match="q_CP' has no place"):
        aurora_from_released(
            {"text_encoder.encoder.layer.0.attention.self.q_CP": torch.ones(8, 1)}, model
        )
    with pytest.raises(ValueError, match="is no parameter of a released"):
        aurora_from_released({"text_encoder.encoder.layer.0.xCP": torch.ones(8, 1)}, model)
