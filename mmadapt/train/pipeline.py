"""`train(recipe)`: data, backbone, stages in order, evaluation, report. Resumes where it was."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmadapt.eval import RunResults
from mmadapt.train.build import device, load_source, make_backbone, make_data
from mmadapt.train.checkpoints import write_text_atomic
from mmadapt.train.config import Recipe
from mmadapt.train.errors import RunError
from mmadapt.train.evaluation import evaluate_run, evaluation_source, report, summary
from mmadapt.train.launch import process_state
from mmadapt.train.loading import dump_recipe, load_recipe
from mmadapt.train.manifest import Manifest
from mmadapt.train.methods import enter_stage, load_finished, prepare
from mmadapt.train.outcome import METRICS, RESOLVED, RunOutcome
from mmadapt.train.ui import Console


def train(recipe: Recipe, *, restart: bool = False, console: Console | None = None) -> RunOutcome:
    """Run a recipe, or go on with it: finished stages are kept, a killed one is resumed.

    The same command after a kill at any moment ends with the same weights, bit for bit, on the
    same machine and library versions.

    Args:
        recipe: from `load_recipe` or `check_recipe`.
        restart: drop every stage of the run directory whose settings differ, and those after it.

    Raises:
        RunError: the directory holds a stage with other settings (without `restart`).
        GuardError: training that does not do what the recipe says; see `guards`.
    """
    if not isinstance(recipe, Recipe):  # a comparison of methods brings its own pipeline
        from mmadapt.train import aurora

        return aurora.train(recipe, restart=restart, console=console)
    state = process_state(recipe.launch)
    console = console or Console(quiet=not state.is_main_process)
    run_dir = Path(recipe.out)
    if state.is_main_process:
        if restart:
            _drop_changed_stages(recipe, run_dir)
        started = Manifest.open(run_dir)
        _check_stages(recipe, started)
        _check_processes(started, state.num_processes)
        make_data(recipe)
        if recipe.eval is not None:  # what could not be evaluated must not be trained first
            load_source(evaluation_source(recipe), seed=recipe.seed, where="eval.data")
        make_backbone(recipe, console)
        write_text_atomic(run_dir / RESOLVED, dump_recipe(recipe))
    state.wait_for_everyone()

    manifest = Manifest.open(run_dir)
    done = all(manifest.is_done(name) for name in recipe.stages)
    if done and (recipe.eval is None or manifest.evaluation(recipe)):
        return _finished(recipe, manifest, console)
    pretrained, model = prepare(recipe)
    _train_stages(recipe, model, pretrained, manifest, console)
    if recipe.eval is None or not state.is_main_process:
        return RunOutcome(run_dir)
    return _evaluate(recipe, model, pretrained, manifest, console)


def evaluate(
    run_dir: str | Path, *, overrides: list[str] | None = None, console: Console | None = None
) -> RunOutcome:
    """Evaluate a finished run again, with `eval.*` settings changed if asked.

    Raises:
        RunError: no finished run under that name.
    """
    run_dir, console = Path(run_dir), console or Console()
    if not (run_dir / RESOLVED).exists():
        raise RunError(f"{run_dir}: no run directory ({RESOLVED} is missing)")
    place = f"out={json.dumps(str(run_dir))}"  # quoted: a folder called 2025 is a name
    recipe = load_recipe(run_dir / RESOLVED, [*(overrides or []), place])
    if not isinstance(recipe, Recipe):
        from mmadapt.train import aurora

        return aurora.evaluate(run_dir, overrides=overrides, console=console)
    if recipe.eval is None:
        raise RunError(f"{run_dir}: the recipe has eval: null; pass eval settings to evaluate it")
    process_state(recipe.launch)
    manifest = Manifest.open(run_dir)
    _check_stages(recipe, manifest)
    for name in recipe.stages:
        if not manifest.is_done(name):
            raise RunError(f"{run_dir}: stage {name!r} is not finished; run `mmadapt train` first")
    pretrained, model = prepare(recipe)
    _train_stages(recipe, model, pretrained, manifest, console)
    return _evaluate(recipe, model, pretrained, manifest, console)


def _train_stages(
    recipe: Recipe, model: Any, pretrained: Any, manifest: Manifest, console: Console
) -> None:
    from mmadapt.train.stages import ADAPTER, run_stage

    names = list(recipe.stages)
    finished = [name for name in names if manifest.is_done(name)]
    if finished:
        load_finished(recipe, model, [Path(recipe.out) / name / ADAPTER for name in finished])
        console.say(f"already trained: {', '.join(finished)}")
    for name in names[len(finished) :]:
        run_stage(recipe, name, model, pretrained, manifest, console)
    enter_stage(recipe, model, names[-1])


def _evaluate(
    recipe: Recipe, model: Any, pretrained: Any, manifest: Manifest, console: Console
) -> RunOutcome:
    run_dir = Path(recipe.out)
    results = evaluate_run(recipe, model.to(device()), pretrained, manifest, console)
    metrics = run_dir / METRICS
    if metrics.exists():  # ablations are runs of their own: evaluating this one keeps their rows
        earlier = RunResults.from_json(metrics.read_text(encoding="utf-8"))
        results = replace(results, ablation=earlier.ablation)
    page = report(results, run_dir)
    entry = {"summary": summary(results.rows), "report": str(page.relative_to(run_dir))}
    manifest.finish_evaluation(recipe, entry)
    return RunOutcome(run_dir, results, page)


def _finished(recipe: Recipe, manifest: Manifest, console: Console) -> RunOutcome:
    run_dir = Path(recipe.out)
    console.say(f"already finished: {run_dir}")
    if recipe.eval is None:
        return RunOutcome(run_dir)
    results = RunResults.from_json((run_dir / METRICS).read_text(encoding="utf-8"))
    return RunOutcome(run_dir, results, run_dir / manifest.evaluation(recipe)["report"])


def _check_stages(recipe: Recipe, manifest: Manifest) -> None:
    stray = [name for name in manifest.stages() if name not in recipe.stages]
    if stray:
        raise RunError(
            f"{manifest.path.parent} holds stage {stray[0]!r}, which the recipe does not have; "
            "choose another `out` or start over with --restart"
        )
    for name in recipe.stages:
        manifest.check_stage(recipe, name)


def _check_processes(manifest: Manifest, processes: int) -> None:
    """The global batch depends on it, and so do the weights."""
    for name, entry in manifest.stages().items():
        if entry.get("processes", processes) != processes:
            raise RunError(
                f"stage {name!r} was trained by {entry['processes']} processes, this run has "
                f"{processes}; start it with {entry['processes']} or choose another `out`"
            )


def _drop_changed_stages(recipe: Recipe, run_dir: Path) -> None:
    """Forget the first stage whose settings differ, and everything after it."""
    manifest = Manifest.open(run_dir)
    keep = True
    for name in list(manifest.stages()):
        if keep and name in recipe.stages:
            try:
                manifest.check_stage(recipe, name)
            except RunError:
                keep = False
        else:
            keep = False
        if not keep:
            manifest.forget_stage(name)
            shutil.rmtree(run_dir / name, ignore_errors=True)
