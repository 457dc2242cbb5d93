"""Adapter checkpoints: what is in them, and loading them by every road."""

import json

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from mmadapt.peft import PillConfig, set_stage


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def own_projector(kind, projector):
    return {"projector": projector} if kind != "llama" else {}


@pytest.mark.parametrize("projector", ["linear", "full", "frozen"])
@pytest.mark.parametrize("low_memory", [False, True])
def test_save_and_load(tiny, kind, projector, low_memory, tmp_path):
    options = own_projector(kind, projector)
    batch = tiny.batch(kind)
    model = tiny.pill(kind, **options)
    if kind != "llama":
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "mmadapt_pill_proj" in name:
                    parameter.add_(0.1)
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.base(kind), tmp_path, low_cpu_mem_usage=low_memory)
    assert torch.equal(logits(loaded, batch), expected)
    assert not any(p.requires_grad for p in loaded.parameters())
    renamed = PeftModel.from_pretrained(tiny.base(kind), tmp_path, adapter_name="other")
    assert torch.equal(logits(renamed, batch), expected)


def test_checkpoint_holds_the_adapter_alone(tiny, kind, tmp_path):
    tiny.pill(kind).save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert all("mmadapt_pill_" in key and ".default" not in key for key in keys)
    assert any("mmadapt_pill_proj" in key for key in keys) == (kind != "llama")
    assert len([k for k in keys if ".mmadapt_pill_proj." not in k]) == 2 * (3 * 3 + 1)


def test_second_adapter_is_loaded_beside_the_first(tiny, kind, tmp_path):
    batch = tiny.batch(kind)
    other = tiny.pill(kind, seed=9, rank=3, gate_heads="kv", adapter="linear")
    expected = logits(other, batch)
    other.save_pretrained(tmp_path)
    model = tiny.pill(kind)
    first = logits(model, batch)
    model.load_adapter(tmp_path, "other", is_trainable=True)
    model.set_adapter("other")
    assert torch.equal(logits(model, batch), expected)
    assert all(p.requires_grad for n, p in model.named_parameters() if ".other" in n)
    model.set_adapter("default")
    assert torch.equal(logits(model.eval(), batch), first)


def test_injection_without_a_peft_model(tiny, kind, tmp_path):
    batch = tiny.batch(kind)
    model = tiny.pill(kind)
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    base = tiny.base(kind)
    base.load_adapter(tmp_path)
    assert torch.equal(logits(base, batch), expected)
    base.add_adapter(PillConfig(rank=3), "fresh")
    assert base.active_adapters() == ["fresh"]
    base.set_adapter("default")
    assert torch.equal(logits(base, batch), expected)
    base.disable_adapters()
    assert not torch.allclose(logits(base, batch), expected)


@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_the_stage_is_saved(tiny, stage, tmp_path):
    model = tiny.pill("blip2")
    set_stage(model, stage)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["stage"] == stage
    config = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, PillConfig) and config.stage == stage
    loaded = PeftModel.from_pretrained(tiny.base("blip2"), tmp_path)
    batch = tiny.batch("blip2")
    assert torch.equal(logits(loaded, batch), logits(model, batch))


def test_incomplete_checkpoints_are_refused(tiny, tmp_path):
    tiny.pill("blip2").save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    lost = next(key for key in weights if "mmadapt_pill_vision" in key)
    save_file({k: v for k, v in weights.items() if k != lost}, file)
    with pytest.raises(ValueError, match=r"1 keys are missing .*mmadapt_pill_vision"):
        PeftModel.from_pretrained(tiny.base("blip2"), tmp_path)


def test_renamed_modules_are_refused(tiny, tmp_path):
    tiny.pill("llava").save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    renamed = {k.replace("language_model", "text_model"): v for k, v in load_file(file).items()}
    save_file(renamed, file)
    with pytest.raises(ValueError, match="does not fit the model"):
        PeftModel.from_pretrained(tiny.base("llava"), tmp_path)


def test_state_dict_round_trip(tiny, kind):
    batch = tiny.batch(kind)
    model, other = tiny.pill(kind), tiny.pill(kind, seed=8)
    assert not torch.equal(logits(model, batch), logits(other, batch))
    result = set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert not result.unexpected_keys
    assert torch.equal(logits(model, batch), logits(other, batch))


def test_base_weights_load_without_adapter_keys(tiny):
    model = tiny.pill("llama")
    weights = {k: v for k, v in model.state_dict().items() if "mmadapt_pill_" not in k}
    assert model.load_state_dict(weights, strict=False).unexpected_keys == []
