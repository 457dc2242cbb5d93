"""The rows of the paper's Table 3 that can be run small, over several seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmadapt.eval import Ablation, AblationRow, RunResults
from mmadapt.train.config import Recipe
from mmadapt.train.errors import RecipeError, RunError
from mmadapt.train.loading import check_recipe
from mmadapt.train.pipeline import RunOutcome, train
from mmadapt.train.ui import Console

SEEDS = (0, 1, 2)
COLUMNS = ("visual", "text only", "AVG")

# name -> changes to the recipe, as dotted paths
VARIATIONS: dict[str, dict[str, object]] = {
    "PILL": {},
    "linear adapter": {"method.adapter": "linear"},
    "no gate": {"method.gate": "none"},
    "one adapter for both modalities": {"method.experts": "shared"},
    "no alignment stage": {"stages.align": None},
    "wrong answers, p = 0.1": {"stages.instruct.wrong_answers": 0.1},
}


def vary(recipe: Recipe, name: str, *, seed: int) -> Recipe:
    """The recipe with one of VARIATIONS and another seed, in a run directory of its own.

    Data and backbone stay those of the base recipe: only what PILL trains differs.
    """
    values = recipe.model_dump(mode="json")
    values["seed"] = seed
    folder = name.replace(",", "").replace(" = ", "").replace(" ", "-").lower()
    values["out"] = str(Path(recipe.out) / "ablations" / f"{folder}-seed{seed}")
    for path, value in VARIATIONS[name].items():
        if path == "stages.instruct.wrong_answers":
            for source in values["stages"]["instruct"]["data"]:
                if source["reader"] == "scienceqa":
                    source["wrong_answers"]["rate"] = value
            continue
        *parents, leaf = path.split(".")
        target = values
        for parent in parents:
            target = target[parent]
        target[leaf] = value
    _drop_idle_rates(values)
    return check_recipe(values, source=f"ablation {name!r}")


def _drop_idle_rates(values: dict) -> None:
    """Rates of components that a variation takes away would be refused."""
    method = values["method"]
    idle = {"gate"} if method["gate"] == "none" else set()
    idle |= {"vision_expert", "text_expert"} if method["experts"] == "shared" else {"shared_expert"}
    for stage in values["stages"].values():
        for component in idle & set(stage["lr"] if stage else ()):
            stage["lr"][component] = None


def run_ablations(
    recipe: Recipe, base: RunOutcome, *, seeds: Sequence[int] = SEEDS, console: Console
) -> RunOutcome:
    """Train and evaluate every variation; merge the rows into the base run's report.

    Each run has its own directory under `<out>/ablations` and resumes like any other.
    """
    if recipe.launch.nproc > 1:
        raise RecipeError("launch.nproc: ablations run in one process, set it to 1")
    if base.results is None:
        raise RunError("ablations need a base run that was evaluated (eval must not be null)")
    if "align" not in recipe.stages or "instruct" not in recipe.stages:
        raise RecipeError("stages: the ablations vary a recipe with the stages align and instruct")
    rows = []
    for number, name in enumerate(VARIATIONS, start=1):
        values: dict[str, list[float]] = {column: [] for column in COLUMNS}
        for seed in seeds:
            console.say(f"ablation {number}/{len(VARIATIONS)}: {name}, seed {seed}")
            results = _results(recipe, base, name, seed, console)
            for column, value in scores(results).items():
                values[column].append(value)
        rows.append(AblationRow(name, values))
    return _merge(base, Ablation(list(COLUMNS), list(seeds), rows))


def _results(
    recipe: Recipe, base: RunOutcome, name: str, seed: int, console: Console
) -> RunResults:
    if not VARIATIONS[name] and seed == recipe.seed:
        return base.results
    results = train(vary(recipe, name, seed=seed), console=console).results
    if results is None:
        raise RunError(f"ablation {name!r}, seed {seed}: ended without an evaluation")
    return results


def scores(results: RunResults) -> dict[str, float]:
    """The tuned model's percentages in COLUMNS."""
    tuned = results.rows[0]
    return {
        "visual": tuned.visual.percent if tuned.visual else float("nan"),
        "text only": tuned.text_only.percent if tuned.text_only else float("nan"),
        "AVG": tuned.table["AVG"],
    }


def _merge(base: RunOutcome, ablation: Ablation) -> RunOutcome:
    from dataclasses import replace

    from mmadapt.train.evaluation import report

    results = replace(base.results, ablation=ablation)
    return RunOutcome(base.run_dir, results, report(results, base.run_dir))
