"""save_pretrained and from_pretrained, the Auto classes, adapter files, starting from BLIP."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Blip2Config,
    Blip2ForConditionalGeneration,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
)

from mmadapt.models import (
    CromeForConditionalGeneration,
    CromeModelConfig,
    crome_adapter_state,
    crome_from_blip,
    load_crome_adapter,
    load_crome_adapter_state,
    save_crome_adapter,
)

VARIANTS = [
    {},
    {"reading": "R2", "adapter_bias": True, "adapter_pre_norm": True},
    {"order": ["text", "instruction"], "adapter_share_up": False, "keep_cls": True},
    {"adapter_share_input": True, "adapter_gated": False, "patch_tap": "bliva"},
    {"adapter_branches": []},
]


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("options", VARIANTS)
def test_round_trip(tiny, kind, options, tmp_path):
    model = tiny.model(kind, **options)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is CromeModelConfig
    for name, value in options.items():
        assert getattr(config, name) == value
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(loaded) is CromeForConditionalGeneration
    batch = tiny.batch(model)
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    assert loaded.generation_config.num_beams == 5


def test_half_precision_keeps_what_trains_in_float32(tiny, tmp_path):
    model = tiny.model()
    model.save_pretrained(tmp_path)
    half = CromeForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, parameter in half.named_parameters():
        frozen = name.startswith(("vision_model", "language_model"))
        assert parameter.dtype == (torch.bfloat16 if frozen else torch.float32), name
    batch = tiny.batch(model)
    exact, rough = logits(model, batch), logits(half, batch).float()
    assert (exact - rough).norm() < 0.05 * exact.norm()


def test_the_adapter_is_five_tensors(tiny, tmp_path):
    model = tiny.model()
    save_crome_adapter(model, tmp_path)
    state = load_file(tmp_path / "crome_adapter.safetensors")
    assert {n: tuple(v.shape) for n, v in state.items()} == {
        "visual.gate": (4, 32),
        "visual.down": (4, 32),
        "text.gate": (4, 32),
        "text.down": (4, 32),
        "up": (32, 4),
    }
    batch = tiny.batch(model)
    expected = logits(model, batch)
    other = tiny.model(identity=True)
    assert not torch.equal(logits(other, batch), expected)
    load_crome_adapter(other, tmp_path)
    assert torch.equal(logits(other, batch), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"adapter_bias": True, "adapter_pre_norm": True},
        {"adapter_share_up": False, "adapter_bias": True},
        {"adapter_share_input": True, "adapter_gated": False},
    ],
)
def test_variants_of_the_adapter_file(tiny, options, tmp_path):
    model = tiny.model(**options)
    save_crome_adapter(model, tmp_path)
    other = tiny.model(seed=1, **options)
    load_crome_adapter(other, tmp_path)
    for name, value in model.adapter.state_dict().items():
        assert torch.equal(value, other.adapter.state_dict()[name]), name


def test_tasks_swap_without_loss(tiny, tmp_path):
    model = tiny.model()
    batch = tiny.batch(model)
    save_crome_adapter(model, tmp_path / "first")
    first = logits(model, batch)
    torch.nn.init.normal_(model.adapter.up)
    save_crome_adapter(model, tmp_path / "second")
    second = logits(model, batch)
    for _ in range(2):
        load_crome_adapter(model, tmp_path / "first")
        assert torch.equal(logits(model, batch), first)
        load_crome_adapter(model, tmp_path / "second")
        assert torch.equal(logits(model, batch), second)


def test_adapters_that_do_not_fit(tiny, tmp_path):
    model = tiny.model()
    save_crome_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=r"other settings: .*adapter_rank: 5 -> 4"):
        load_crome_adapter(tiny.model(adapter_rank=5), tmp_path)
    before = model.adapter.up.clone()
    state = crome_adapter_state(model)
    del state["text.gate"]
    with pytest.raises(ValueError, match="nothing was loaded"):
        load_crome_adapter_state(model, {n: v + 1 for n, v in state.items()})
    assert torch.equal(model.adapter.up, before)
    with pytest.raises(ValueError, match="has no adapter"):
        save_crome_adapter(tiny.model(adapter_branches=[]), tmp_path)


SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}


def make_blip(kind, text_config):
    torch.manual_seed(3)
    vision = {**SMALL, "num_hidden_layers": 2, "image_size": 8, "patch_size": 4}
    qformer = {**SMALL, "num_hidden_layers": 2, "encoder_hidden_size": 16, "vocab_size": 60}
    options = {"num_query_tokens": 3, "image_token_index": 3}
    if kind == "instructblip":
        model = InstructBlipForConditionalGeneration(
            InstructBlipConfig(
                vision_config=vision, qformer_config=qformer, text_config=text_config, **options
            )
        )
    else:
        config = Blip2Config(
            vision_config=vision, qformer_config=qformer, text_config=text_config, **options
        )
        model = Blip2ForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


@pytest.mark.parametrize("kind", ["instructblip", "blip-2"])
def test_starting_from_blip(tiny, kind):
    source = make_blip(kind, tiny.config("llama").text_config)
    options = {"instruction_aware": False} if kind == "blip-2" else {}
    model = crome_from_blip(source, adapter_rank=4, **options)
    assert model.language_model is source.language_model and not model.training
    batch = tiny.batch(model, images=(1,))
    _, queries = model._features(batch["pixel_values"], batch["qformer_input_ids"], None)
    seen = source.vision_model(batch["pixel_values"]).last_hidden_state
    given = {"query_embeds": source.query_tokens, "encoder_hidden_states": seen}
    if kind == "instructblip":
        given["input_ids"] = batch["qformer_input_ids"]
    torch.testing.assert_close(queries, source.qformer(**given).last_hidden_state[:, :3])
    assert torch.equal(model.adapter.up, torch.zeros(32, 4))


def test_another_language_model_behind(tiny):
    source = make_blip("instructblip", tiny.config("llama").text_config)
    t5 = tiny.model("t5").language_model
    model = crome_from_blip(source, t5, adapter_rank=4)
    assert model.config.is_encoder_decoder and model.language_model is t5
    assert model(**tiny.batch(model)).loss.isfinite()


def test_other_models_are_refused(tiny):
    with pytest.raises(ValueError, match="source is an InstructBLIP or BLIP-2 model, got Llama"):
        crome_from_blip(tiny.model().language_model)
