"""From a recipe to live objects: data on disk, backbone, tuned model, data sets, collators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mmadapt.train.config import DataSource, ModelConfig, PillMethod, Recipe
from mmadapt.train.errors import RecipeError
from mmadapt.train.made import already_made, making
from mmadapt.train.ui import Console


def make_data(recipe: Recipe) -> None:
    """Write the data set the recipe makes itself; a set that is there already is kept."""
    if recipe.data.make is None:
        return
    from mmadapt.data import write_digits_vqa

    write_digits_vqa(recipe.data.root, **_arguments(recipe.data.make_args, "data.make_args"))
    if recipe.data.make == "digits_turned":
        from mmadapt.data.digits_turned import write_turned_digits

        write_turned_digits(recipe.data.root, f"{recipe.data.root}_turned")


def make_backbone(recipe: Recipe, console: Console) -> None:
    """Pretrain and save the backbone the recipe makes itself; a finished one is reused.

    It is built beside its folder and renamed into place with the settings it was built from.

    Raises:
        RunError: the folder holds a backbone of other settings, or something else.
    """
    model = recipe.model
    if model.make is None:
        return
    folder = Path(model.name)
    wanted = {"make": model.make, "make_args": model.make_args, "data": recipe.data.make_args}
    if already_made(folder, wanted):
        return
    if recipe.data.root is None:
        raise RecipeError("model.make: digits needs data.root, the scans to pretrain on")
    from mmadapt.train.digits import make_digits_backbone

    with making(folder, wanted) as scratch, console.progress("frozen parts") as progress:
        make_digits_backbone(
            scratch,
            recipe.data.root,
            progress=progress,
            **_arguments(model.make_args, "model.make_args"),
        )


def _arguments(values: dict[str, Any], path: str) -> dict[str, Any]:
    if "progress" in values:
        raise RecipeError(f"{path}.progress: is not a setting")
    return values


def load_backbone(model: ModelConfig) -> Any:
    """`mmadapt.models.Pretrained` of the recipe's backbone.

    Raises:
        RecipeError: nothing usable under that name.
    """
    from mmadapt.models import load_pretrained

    try:
        return load_pretrained(
            model.name,
            dtype=model.dtype,
            attn_implementation=model.attn,
            image_statistics=model.image_statistics,
        )
    except (OSError, ValueError) as error:
        raise RecipeError(f"model.name: cannot load {model.name!r}: {error}") from error


def pill_config(method: PillMethod, *, stage: str) -> Any:
    """`mmadapt.peft.PillConfig` of the recipe's method, starting in `stage`."""
    from mmadapt.peft import PillConfig

    settings = method.model_dump(exclude={"type"}, exclude_none=True)
    try:
        return PillConfig(stage=stage, **settings)
    except ValueError as error:
        raise RecipeError(f"method: {error}") from error


def add_adapter(model: Any, recipe: Recipe) -> Any:
    """Wrap the frozen backbone; the fresh adapter depends on the seed alone."""
    from peft import get_peft_model
    from transformers import set_seed

    set_seed(recipe.seed)
    config = pill_config(recipe.method, stage=next(iter(recipe.stages)))
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise RecipeError(f"method: {error}") from error


def load_source(source: DataSource, *, seed: int, where: str) -> Any:
    """The data set of one source; `where` is its path in the recipe, for errors."""
    from mmadapt.data import load

    try:
        return load(source_spec(source, seed=seed))
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from error


def source_spec(source: DataSource, *, seed: int) -> dict[str, Any]:
    """The source as `mmadapt.data.load` takes it: one flat mapping without nulls."""
    spec = source.model_dump(exclude_none=True, exclude={"wrong_answers"})
    if source.wrong_answers.rate:
        spec["wrong_answers"] = source.wrong_answers.mode
        spec["wrong_answer_rate"] = source.wrong_answers.rate
        spec["seed"] = seed
    return spec


def stage_dataset(recipe: Recipe, stage: str) -> Any:
    """The sources of a stage one after another; the sampler mixes them by size."""
    from mmadapt.data import Mixture

    return Mixture(
        [
            load_source(source, seed=recipe.seed, where=f"stages.{stage}.data[{i}]")
            for i, source in enumerate(recipe.stages[stage].data)
        ]
    )


def collator(pretrained: Any, *, max_length: int, with_labels: bool) -> Any:
    """Labelled, right-padded batches for training, or left-padded prompts for generation."""
    own = getattr(pretrained, "collator", None)
    if own is not None:
        return own(max_length=max_length, with_labels=with_labels)
    from mmadapt.data import PillCollator

    return PillCollator(
        pretrained.tokenizer,
        pretrained.image_processor,
        image_token_id=pretrained.image_token_id,
        num_image_tokens=pretrained.num_image_tokens,
        max_length=max_length,
        with_labels=with_labels,
        pad_side="right" if with_labels else "left",
    )


def device() -> torch.device:
    from accelerate import PartialState

    return PartialState().device
