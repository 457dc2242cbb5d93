"""Recipes that compare methods: what is refused, and how it is said."""

import pytest

from mmadapt.train import RecipeError, dump_recipe, find_recipe, load_recipe
from mmadapt.train.aurora import AuroraRecipe


@pytest.mark.parametrize("task", ["retrieval", "vqa"])
def test_shipped_recipes_load_and_dump(task, tmp_path):
    recipe = load_recipe(find_recipe(f"aurora_digits_{task}"))
    assert isinstance(recipe, AuroraRecipe) and list(recipe.methods) == ["full", "lora", "aurora"]
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe))
    assert load_recipe(file) == recipe


@pytest.mark.parametrize(
    "override, message",
    [
        ("methods.aurora.rnak=4", r"methods\.aurora\.aurora\.rnak: unknown key"),
        ("methods.lora.match=full", r"methods\.lora\.match: 'full' names no aurora method"),
        ("methods.lora.rank=2", "give either rank or match"),
        ("methods.aurora=null", r"methods\.lora\.match: 'aurora' names no aurora method"),
        ("data.train.reader=vqav2", r"data\.train\.reader: vqav2 is not for task retrieval"),
        ("train.max_steps=5", r"schedule: epoch_cosine does not go with train\.max_steps"),
        ("train.warmup_steps=5", r"epoch_cosine does not go with train\.warmup_steps"),
        ("train.learning_rate=1", r"train\.learning_rate: cannot be set here"),
        ("objective.label_smoothing=0.1", r"objective\.label_smoothing: is not for task retrieval"),
        ("objective.ice=on", r"objective\.ice: Input should be 'off', 'released'"),
        ("model.make=null", "make_args"),
        ("task=captioning", "task: Input should be 'retrieval' or 'vqa'"),
    ],
)
def test_errors_name_the_key(override, message, recipe):
    with pytest.raises(RecipeError, match=message):
        recipe("retrieval", override)


def test_ranking_needs_candidates(recipe):
    with pytest.raises(RecipeError, match=r"data\.answers: eval\.inference rank needs"):
        recipe("vqa", "data.answers=null")
    recipe("vqa", "data.answers=null", "eval.inference=generate")


def test_a_method_can_be_left_out(recipe):
    assert list(recipe("retrieval", "methods.lora=null").methods) == ["full", "aurora"]
