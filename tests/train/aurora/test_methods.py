"""What each method trains, and LoRA of Aurora's size."""

import pytest
from transformers import BlipForImageTextRetrieval, BlipForQuestionAnswering

from mmadapt.train import RecipeError
from mmadapt.train.aurora.methods import (
    add_method,
    aurora_parameters,
    lora_ranks,
    trainable_parameters,
)
from mmadapt.train.digits.blip import BlipSettings, build_model, make_tokenizer

SETTINGS = BlipSettings(hidden_size=32, num_layers=2, num_heads=2)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def blip(tokenizer):
    return lambda task: build_model(tokenizer, SETTINGS, task)


def trained(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


def test_full_trains_everything(recipe, blip):
    model = add_method(blip("retrieval"), recipe("retrieval"), "full")
    assert isinstance(model, BlipForImageTextRetrieval)
    assert trainable_parameters(model) == sum(p.numel() for p in model.parameters())


def test_aurora_trains_the_released_heads(recipe, blip):
    names = trained(add_method(blip("retrieval"), recipe("retrieval"), "aurora"))
    others = [n for n in names if "mmadapt_aurora_" not in n]
    assert {n.split(".modules_to_save")[0].split(".")[-1] for n in others} == {
        "vision_proj",
        "itm_head",
    }
    with_text = recipe("retrieval", "methods.aurora.text_proj=true")
    names = trained(add_method(blip("retrieval"), with_text, "aurora"))
    assert any("text_proj" in n for n in names)
    names = trained(add_method(blip("vqa"), recipe("vqa"), "aurora"))
    assert all("mmadapt_aurora_" in n for n in names)
    assert any("text_decoder" in n for n in names)


@pytest.mark.parametrize("task", ["retrieval", "vqa"])
@pytest.mark.parametrize("rank", [4, 16])
def test_lora_comes_as_close_as_its_layers_allow(task, rank, recipe, blip):
    wanted = recipe(task, f"methods.aurora.rank={rank}")
    aurora = trainable_parameters(add_method(blip(task), wanted, "aurora"))
    lora = add_method(blip(task), wanted, "lora")
    found = trainable_parameters(lora)
    ranks = lora_ranks(blip(task), wanted, "lora")
    step = 32 * 4  # the largest layer, in + out
    assert 0 <= aurora - found < step
    assert max(ranks.values()) - min(ranks.values()) <= 1
    if len(ranks) == 2 * 4 + (2 if task == "retrieval" else 4) * 6:
        assert min(ranks.values()) >= 1
    scales = {module.scaling["default"] for module in lora.modules() if hasattr(module, "scaling")}
    assert scales == {1.0}


def test_a_given_rank_is_used_everywhere(recipe, blip):
    wanted = recipe("vqa", "methods.lora.rank=3", "methods.lora.match=null")
    ranks = lora_ranks(blip("vqa"), wanted, "lora")
    assert set(ranks.values()) == {3} and len(ranks) == 2 * 4 + 2 * 2 * 6
    assert isinstance(blip("vqa"), BlipForQuestionAnswering)


def test_counting_leaves_the_model_alone(recipe, blip):
    model = blip("retrieval")
    aurora_parameters(model, recipe("retrieval"), "aurora")
    assert not any("lora" in n or "aurora" in n for n, _ in model.named_parameters())


def test_a_method_that_does_not_fit_is_named(recipe, blip):
    wanted = recipe("retrieval", "methods.aurora.components=[decoder]")
    with pytest.raises(RecipeError, match=r"methods\.aurora: AuroraConfig\.components"):
        add_method(blip("retrieval"), wanted, "aurora")
