"""Trainable parameters at the size of BLIP-base, on the meta device."""

import pytest
import torch
from peft import get_peft_model
from transformers import (
    BlipConfig,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    LlamaConfig,
    LlamaForCausalLM,
)

from mmadapt.peft import AuroraConfig

HEADS = ["vision_proj", "itm_head"]
WIDTH, LAYERS = 768, 12


def base(cls):
    config = BlipConfig(
        text_config={"vocab_size": 30524, "encoder_hidden_size": WIDTH},
        vision_config={"image_size": 384},
        image_text_hidden_size=256,
    )
    with torch.device("meta"):
        return cls(config)


def trainable(model, without=()):
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return sum(p.numel() for n, p in named.items() if not any(part in n for part in without))


def tune(cls, rank, **config):
    return get_peft_model(base(cls), AuroraConfig(rank=rank, **config))


@pytest.mark.parametrize(
    "rank, adapter, total, without_core",
    [
        (16, 68_992, 267_394, 64_896),
        (32, 125_696, 324_098, 92_928),
        (64, 411_136, 609_538, 148_992),
        (128, 2_358_272, 2_556_674, 261_120),
    ],
)
def test_retrieval(rank, adapter, total, without_core):
    model = tune(BlipForImageTextRetrieval, rank, modules_to_save=HEADS)
    assert trainable(model) == total
    assert trainable(model, HEADS) == adapter
    assert trainable(model, [*HEADS, ".core"]) == without_core
    assert adapter == rank**3 + 1752 * rank + 36_864


@pytest.mark.parametrize(
    "rank, total", [(16, 107_008), (32, 164_864), (64, 452_608), (128, 2_404_352)]
)
def test_question_answering(rank, total):
    assert trainable(tune(BlipForQuestionAnswering, rank)) == total


@pytest.mark.parametrize("rank, total", [(16, 28_048), (32, 56_096), (64, 112_192), (128, 224_384)])
def test_pure_cp(rank, total):
    """The paper's decomposition over the same 216 weights: 2 d R + K R + R."""
    model = tune(BlipForImageTextRetrieval, rank, core="diagonal", gqt=False)
    assert trainable(model) == total == rank * (2 * WIDTH + 216 + 1)


def test_pure_cp_over_fewer_weights():
    """q, k and v alone, 108 weights: the paper's tenth of a million at rank 64."""
    rank = 64
    fewer = tune(
        BlipForImageTextRetrieval, rank, core="diagonal", gqt=False,
        components=["vit_qkv", "text_self", "cross"],
    )  # fmt: skip
    assert trainable(fewer) == rank * (2 * WIDTH + 108 + 1) == 105_280


def test_the_backbone_has_the_published_size():
    model = base(BlipForImageTextRetrieval)
    count = {n: sum(p.numel() for p in m.parameters()) for n, m in model.named_children()}
    assert count["vision_model"] == 86_090_496
    assert count["text_encoder"] == 137_258_496
    # The released model's trained temperature is a parameter too.
    assert sum(count.values()) + 1 == 223_744_259
    assert sum(count[name] for name in HEADS) == 198_402


def test_names_and_shapes():
    model = tune(BlipForImageTextRetrieval, 32)
    shapes = {
        n.removeprefix("base_model.").replace(".default", ""): tuple(p.shape)
        for n, p in model.named_parameters()
        if p.requires_grad
    }
    mode = "mmadapt_aurora_mode"
    expected = {
        "mmadapt_aurora_factors.factor_in_768": (32, WIDTH),
        "mmadapt_aurora_factors.factor_out_768": (WIDTH, 32),
        "mmadapt_aurora_factors.core": (32, 32, 32),
    }
    for i in range(LAYERS):
        vision = f"model.vision_model.encoder.layers.{i}"
        expected |= {
            f"{vision}.self_attn.qkv.{mode}": (3, 32),
            f"{vision}.self_attn.projection.{mode}": (1, 32),
            f"{vision}.mlp.fc1.{mode}": (4, 32),
            f"{vision}.mlp.fc2.{mode}": (4, 32),
        }
        text = f"model.text_encoder.encoder.layer.{i}"
        expected |= {
            f"{text}.{attention}.self.{head}.{mode}": (1, 32)
            for attention in ("attention", "crossattention")
            for head in ("query", "key", "value")
        }
        expected |= {
            f"{text}.output.mmadapt_aurora_{part}_{of}": (WIDTH,)
            for part in ("scale", "shift")
            for of in ("self", "cross")
        }
    assert shapes == expected


def test_llama():
    """At the size of LLaMA-7B: two factors, the core and 128 mode vectors."""
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig())
    model = get_peft_model(llama, AuroraConfig(rank=64))
    assert trainable(model) == 524_288 + 262_144 + 8_192


def test_a_wider_vision_tower_has_factors_of_its_own():
    with torch.device("meta"):
        blip = BlipForImageTextRetrieval(
            BlipConfig(
                vision_config={
                    "hidden_size": 1024,
                    "intermediate_size": 4096,
                    "num_hidden_layers": 24,
                    "num_attention_heads": 16,
                },
                text_config={"encoder_hidden_size": 1024},
            )
        )
    model = get_peft_model(blip, AuroraConfig(rank=16))
    factors = model.base_model.factors["default"]
    assert {n: tuple(p.shape) for n, p in factors.named_parameters()} == {
        "core": (16, 16, 16),
        "factor_in_768": (16, 768),
        "factor_in_1024": (16, 1024),
        "factor_out_768": (768, 16),
        "factor_out_1024": (1024, 16),
    }
