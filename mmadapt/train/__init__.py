"""Stages, trainer and orchestrator: from a recipe to a run directory.

Names are loaded on first use, so that commands which train nothing start without torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmadapt.train.ablations import run_ablations
    from mmadapt.train.config import Recipe
    from mmadapt.train.errors import GuardError, MMAdaptError, RecipeError, RunError
    from mmadapt.train.loading import check_recipe, dump_recipe, load_recipe
    from mmadapt.train.pipeline import RunOutcome, evaluate, train
    from mmadapt.train.recipes import find_recipe, shipped
    from mmadapt.train.schedule import pill_lr, pill_schedule
    from mmadapt.train.trainer import StageTrainer
    from mmadapt.train.ui import Console
    from mmadapt.train.validation import validate

_MODULES = {
    "ablations": ("run_ablations",),
    "config": ("Recipe",),
    "errors": ("GuardError", "MMAdaptError", "RecipeError", "RunError"),
    "loading": ("check_recipe", "dump_recipe", "load_recipe"),
    "pipeline": ("RunOutcome", "evaluate", "train"),
    "recipes": ("find_recipe", "shipped"),
    "schedule": ("pill_lr", "pill_schedule"),
    "trainer": ("StageTrainer",),
    "ui": ("Console",),
    "validation": ("validate",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Console",
    "GuardError",
    "MMAdaptError",
    "Recipe",
    "RecipeError",
    "RunError",
    "RunOutcome",
    "StageTrainer",
    "check_recipe",
    "dump_recipe",
    "evaluate",
    "find_recipe",
    "load_recipe",
    "pill_lr",
    "pill_schedule",
    "run_ablations",
    "shipped",
    "train",
    "validate",
]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
