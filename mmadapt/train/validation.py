"""`mmadapt validate`: what a recipe would train, and whether its data is sound, without weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmadapt import models
from mmadapt.train.arguments import build_arguments
from mmadapt.train.build import load_source, pill_config, stage_dataset
from mmadapt.train.components import count, parameter_groups, trainable
from mmadapt.train.config import Recipe
from mmadapt.train.errors import RecipeError
from mmadapt.train.evaluation import evaluation_source
from mmadapt.train.methods import components_of, enter_stage
from mmadapt.train.ui import Console


def validate(recipe: Recipe, console: Console) -> list[str]:
    """Check a recipe as far as possible without weights or training; returns the problems.

    The backbone is built on the meta device from its configuration: no weights are read. A
    backbone or data set that the recipe makes itself and that does not exist yet is skipped.
    """
    if not isinstance(recipe, Recipe):
        from mmadapt.train.aurora.validation import validate_comparison

        return validate_comparison(recipe, console)
    problems: list[str] = []
    for name, stage in recipe.stages.items():
        try:
            build_arguments(
                stage.train,
                output_dir=str(Path(recipe.out) / name),
                learning_rate=stage.lr.default,
                seed=recipe.seed,
            )
        except (ValueError, ImportError) as error:
            problems.append(f"stages.{name}.train: {error}")
    problems += _check_model(recipe, console)
    problems += _check_data(recipe, console)
    return problems


def _check_model(recipe: Recipe, console: Console) -> list[str]:
    if recipe.model.make is not None and not Path(recipe.model.name).exists():
        console.say(f"model.name: {recipe.model.name} will be made by the recipe; not checked")
        return []
    try:
        model = meta_model(recipe)
    except (OSError, ValueError) as error:
        return [f"model.name: {error}"]
    problems = []
    for name, stage in recipe.stages.items():
        enter_stage(recipe, model, name)
        parts = components_of(recipe, model)
        console.parameters(name, count(parts))
        try:
            parameter_groups(parts, stage.lr, weight_decay=0.0, stage=name)
        except RecipeError as error:
            problems.append(str(error))
        if not trainable(parts):
            problems.append(f"stages.{name}: nothing to train")
    return problems


def meta_model(recipe: Recipe) -> Any:
    """The tuned model on the meta device: shapes and names, no weights."""
    import transformers
    from peft import get_peft_model

    import mmadapt.models.crome  # noqa: F401  (registers CROME with the Auto classes)

    config = transformers.AutoConfig.from_pretrained(recipe.model.name)
    architecture = (config.architectures or ["none"])[0]
    model_class = getattr(transformers, architecture, None)
    if architecture == "CromeForConditionalGeneration":
        model_class = models.CromeForConditionalGeneration
    if model_class is None:
        raise ValueError(f"{recipe.model.name}: transformers has no class {architecture}")
    with torch.device("meta"):
        base = model_class(config)
        if recipe.method.type == "crome":
            from mmadapt.train.crome.build import crome_from

            return crome_from(base, recipe.method, qformer_vocab_size=None)
        return get_peft_model(base, pill_config(recipe.method, stage=next(iter(recipe.stages))))


def _check_data(recipe: Recipe, console: Console) -> list[str]:
    if recipe.data.make is not None and not Path(recipe.data.root).exists():
        console.say(f"data.root: {recipe.data.root} will be made by the recipe; not checked")
        return []
    readers: dict[str, Callable[[], Any]] = {
        f"stages.{name}.data": partial(stage_dataset, recipe, name) for name in recipe.stages
    }
    if recipe.eval is not None:
        readers["eval.data"] = lambda: load_source(
            evaluation_source(recipe), seed=recipe.seed, where="eval.data"
        )
    problems = []
    for where, read in readers.items():
        try:
            dataset = read()
        except RecipeError as error:
            problems.append(str(error))
            continue
        console.say(f"{where}: {len(dataset):,} samples, checking every image")
        problems += [f"{where}: {problem}" for problem in dataset.validate()]
    return problems
