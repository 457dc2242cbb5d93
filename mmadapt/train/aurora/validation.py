"""`mmadapt validate` for a comparison: what each method would train, and whether data is sound."""

from __future__ import annotations

from pathlib import Path

import torch

from mmadapt.train.arguments import build_arguments
from mmadapt.train.aurora.build import load_source
from mmadapt.train.aurora.config import AuroraRecipe
from mmadapt.train.aurora.evaluation import check_evaluation
from mmadapt.train.aurora.methods import add_method, trainable_parameters
from mmadapt.train.errors import RecipeError
from mmadapt.train.ui import Console


def validate_comparison(recipe: AuroraRecipe, console: Console) -> list[str]:
    """The problems found without reading weights; what the recipe makes itself is skipped."""
    problems = []
    try:
        build_arguments(recipe.train, output_dir=recipe.out, learning_rate=1.0, seed=recipe.seed)
    except (ValueError, ImportError) as error:
        problems.append(f"train: {error}")
    return problems + _check_model(recipe, console) + _check_data(recipe, console)


def _check_model(recipe: AuroraRecipe, console: Console) -> list[str]:
    if recipe.model.make is not None and not Path(recipe.model.name).exists():
        console.say(f"model.name: {recipe.model.name} will be made by the recipe; not checked")
        return []
    import transformers

    kinds = {"retrieval": "BlipForImageTextRetrieval", "vqa": "BlipForQuestionAnswering"}
    problems = []
    for name in recipe.methods:
        try:
            config = transformers.AutoConfig.from_pretrained(recipe.model.name)
            with torch.device("meta"):
                blip = getattr(transformers, kinds[recipe.task])(config)
                trained = trainable_parameters(add_method(blip, recipe, name))
            console.say(f"methods.{name}: {trained:,} parameters are trained")
        except (OSError, RecipeError, AttributeError) as error:
            problems.append(f"methods.{name}: {error}")
    return problems


def _check_data(recipe: AuroraRecipe, console: Console) -> list[str]:
    if recipe.data.make is not None and not Path(recipe.data.root).exists():
        console.say(f"data.root: {recipe.data.root} will be made by the recipe; not checked")
        return []
    problems = []
    for part in ("train", "test"):
        try:
            dataset = load_source(getattr(recipe.data, part), f"data.{part}")
        except RecipeError as error:
            problems.append(str(error))
            continue
        console.say(f"data.{part}: {len(dataset):,} samples, checking every image")
        problems += [f"data.{part}: {problem}" for problem in dataset.validate()]
    if not problems:
        try:
            check_evaluation(recipe)
        except RecipeError as error:
            problems.append(str(error))
    return problems
