"""What CROME's parts are worth on a recipe: the grid of docs/crome.md, over several seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmadapt.eval import RunResults
from mmadapt.train.ablations import SEEDS, check_base, run_grid
from mmadapt.train.config import Recipe
from mmadapt.train.errors import RecipeError
from mmadapt.train.loading import check_recipe
from mmadapt.train.pipeline import RunOutcome, train
from mmadapt.train.ui import Console

COLUMNS = ("new task", "new task, before", "earlier questions, after")

# name -> changes to the recipe, as dotted paths; a rank is a factor on the recipe's.
VARIATIONS: dict[str, dict[str, Any]] = {
    "CROME": {},
    "no adapter": {"method.branches": [], "stages.task": None},
    "text branch only": {"method.order": ["text", "instruction"]},
    "visual branch only": {"method.order": ["visual", "instruction"]},
    "gate off": {"method.gated": False},
    "own up for each modality": {"method.share_up": False},
    "one gate and down for both": {"method.share_input": True},
    "reading R2": {"method.reading": "R2"},
    "visual before text": {"method.order": ["visual", "text", "instruction"]},
    "projections in place of the adapter": {"method.task_trains": ["projector"]},
    "LoRA of equal size in place of the adapter": {"method.task_trains": ["lora"]},
    "rank halved": {"method.rank": 0.5},
    "rank doubled": {"method.rank": 2.0},
}


def vary(recipe: Recipe, name: str, *, seed: int) -> Recipe:
    """The recipe with one of VARIATIONS and another seed, in a run directory of its own.

    Data and backbone stay those of the base recipe. Without an adapter nothing is left to train in
    stage (c): the model of stage (b) is asked the new task's questions.
    """
    values = recipe.model_dump(mode="json")
    values["seed"] = seed
    folder = name.replace(",", "").replace(" ", "-").lower()
    values["out"] = str(Path(recipe.out) / "ablations" / f"{folder}-seed{seed}")
    if values["eval"]["data"] is None:
        target = [s for s in values["stages"]["task"]["data"] if s["reader"] == "scienceqa"][-1]
        values["eval"]["data"] = {**target, "split": values["eval"]["split"]}
    for path, value in VARIATIONS[name].items():
        *parents, leaf = path.split(".")
        target = values
        for parent in parents:
            target = target[parent]
        if path == "method.rank":
            if target[leaf] is None:
                raise RecipeError(f"method.rank: the ablation {name!r} needs a number to vary")
            value = max(1, int(target[leaf] * value))
        target[leaf] = value
    if not values["method"]["branches"]:
        for stage in values["stages"].values():
            if stage:
                stage["lr"]["adapter"] = None
    return check_recipe(values, source=f"ablation {name!r}")


def run_crome_ablations(
    recipe: Recipe,
    base: RunOutcome,
    *,
    names: Sequence[str] = tuple(VARIATIONS),
    seeds: Sequence[int] = SEEDS,
    console: Console,
) -> RunOutcome:
    """Train and evaluate variations; merge the rows into the base run's report.

    Each run has its own directory under `<out>/ablations` and resumes like any other.

    Raises:
        RecipeError: the recipe has no stage `task`, or runs in several processes.
        RunError: the base run was not evaluated.
    """
    check_base(recipe, base, ("instruct", "task"))

    def results(name: str, seed: int) -> RunResults | None:
        if not VARIATIONS[name] and seed == recipe.seed:
            return base.results
        return train(vary(recipe, name, seed=seed), console=console).results

    return run_grid(base, names, seeds, COLUMNS, results, scores, console)


def scores(results: RunResults) -> dict[str, float]:
    """Percentages in COLUMNS; nan where the run had no stage (c)."""
    tuned = results.rows[0].table["AVG"]
    transfer = results.transfer
    if transfer is None:
        return dict(zip(COLUMNS, (tuned, tuned, float("nan")), strict=True))
    return {
        "new task": tuned,
        "new task, before": transfer.target[0].percent,
        "earlier questions, after": 100 * transfer.source_score(),
    }
