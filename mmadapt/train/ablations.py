"""The rows of the paper's Table 3 that can be run small, over several seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
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
    check_base(recipe, base, ("align", "instruct"))

    def results(name: str, seed: int) -> RunResults | None:
        if not VARIATIONS[name] and seed == recipe.seed:
            return base.results
        return train(vary(recipe, name, seed=seed), console=console).results

    return run_grid(base, tuple(VARIATIONS), seeds, COLUMNS, results, scores, console)


def scores(results: RunResults) -> dict[str, float]:
    """The tuned model's percentages in COLUMNS."""
    tuned = results.rows[0]
    return {
        "visual": tuned.visual.percent if tuned.visual else float("nan"),
        "text only": tuned.text_only.percent if tuned.text_only else float("nan"),
        "AVG": tuned.table["AVG"],
    }


def check_base(recipe: Recipe, base: RunOutcome, stages: tuple[str, str]) -> None:
    """Raises RecipeError or RunError where ablations cannot start from this run."""
    if recipe.launch.nproc > 1:
        raise RecipeError("launch.nproc: ablations run in one process, set it to 1")
    if base.results is None:
        raise RunError("ablations need a base run that was evaluated (eval must not be null)")
    if not set(stages) <= set(recipe.stages):
        wanted = " and ".join(stages)
        raise RecipeError(f"stages: the ablations vary a recipe with the stages {wanted}")


def run_grid(
    base: RunOutcome,
    names: Sequence[str],
    seeds: Sequence[int],
    columns: Sequence[str],
    results: Callable[[str, int], RunResults | None],
    scores: Callable[[RunResults], dict[str, float]],
    console: Console,
) -> RunOutcome:
    """The scores of `results(name, seed)` for every name and seed, merged into the base's report.

    Raises:
        RunError: a run ended without an evaluation.
    """
    from mmadapt.train.evaluation import report

    rows = []
    for number, name in enumerate(names, start=1):
        values: dict[str, list[float]] = {column: [] for column in columns}
        for seed in seeds:
            console.say(f"ablation {number}/{len(names)}: {name}, seed {seed}")
            found = results(name, seed)
            if found is None:
                raise RunError(f"ablation {name!r}, seed {seed}: ended without an evaluation")
            for column, value in scores(found).items():
                values[column].append(value)
        rows.append(AblationRow(name, values))
    merged = replace(base.results, ablation=Ablation(list(columns), list(seeds), rows))
    return RunOutcome(base.run_dir, merged, report(merged, base.run_dir))
