"""Where the methods of a recipe differ: how a model is made, staged, saved and loaded.

PILL is a PEFT adapter in a frozen model; CROME is a model of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mmadapt.train.build import add_adapter, load_backbone
from mmadapt.train.components import Components
from mmadapt.train.config import Recipe


def prepare(recipe: Recipe) -> tuple[Any, nn.Module]:
    """What feeds the model (`mmadapt.models.Pretrained` or alike), and the untrained model."""
    if recipe.method.type == "crome":
        from mmadapt.train.crome.build import prepare_crome

        return prepare_crome(recipe)
    pretrained = load_backbone(recipe.model)
    return pretrained, add_adapter(pretrained.model, recipe)


def enter_stage(recipe: Recipe, model: nn.Module, stage: str) -> None:
    """Set what the forward pass does and what trains."""
    if recipe.method.type == "crome":
        from mmadapt.train.crome.build import enter_crome_stage

        enter_crome_stage(recipe, model, stage)
        return
    from mmadapt.peft import set_stage

    set_stage(model, stage)


def components_of(recipe: Recipe, model: nn.Module) -> Components:
    """Parameters by component."""
    if recipe.method.type == "crome":
        from mmadapt.models import crome_components

        return crome_components(model)
    from mmadapt.peft import components

    return components(model)


def load_finished(recipe: Recipe, model: nn.Module, folders: Sequence[Path]) -> None:
    """Put what the finished stages left behind into the model.

    An adapter of PILL is whole after every stage; a stage of CROME leaves what it trained.
    """
    from mmadapt.train.adapters import load_adapter

    for folder in folders if recipe.method.type == "crome" else folders[-1:]:
        load_adapter(model, folder)
