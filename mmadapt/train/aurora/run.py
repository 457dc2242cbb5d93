"""`train(recipe)`: data, model, every method from the same weights, evaluation, one table."""

from __future__ import annotations

import gc
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from mmadapt.eval import Comparison, MethodRow, write_comparison
from mmadapt.train import checkpoints
from mmadapt.train.arguments import build_arguments
from mmadapt.train.aurora.build import (
    Backbone,
    collator,
    load_backbone,
    load_source,
    make_backbone,
    make_data,
    objective,
)
from mmadapt.train.aurora.config import AuroraRecipe
from mmadapt.train.aurora.evaluation import chance, check_evaluation, columns, evaluate_model
from mmadapt.train.aurora.measure import training_memory
from mmadapt.train.aurora.methods import add_method, trainable_parameters
from mmadapt.train.aurora.trainer import STATE, ObjectiveTrainer, load_trained, save_trained
from mmadapt.train.checkpoints import write_text_atomic
from mmadapt.train.errors import RunError
from mmadapt.train.launch import process_state
from mmadapt.train.loading import dump_recipe, load_recipe
from mmadapt.train.manifest import Manifest
from mmadapt.train.outcome import METRICS, RESOLVED, RunOutcome
from mmadapt.train.ui import Console
from mmadapt.train.versions import git_commit, versions

# The released optimizer: AdamW, weight decay on everything, no clipping.
DEFAULTS: dict[str, Any] = {
    "adam_beta2": 0.999,
    "weight_decay": 0.05,
    "ddp_broadcast_buffers": False,
}


def train(
    recipe: AuroraRecipe, *, restart: bool = False, console: Console | None = None
) -> RunOutcome:
    """Run a comparison, or go on with it: finished methods are kept, a killed one is resumed.

    Args:
        recipe: from `load_recipe`.
        restart: drop every method of the run directory whose settings differ.

    Raises:
        RunError: the directory holds a method with other settings (without `restart`).
        GuardError: training that does not do what the recipe says.
    """
    state = process_state(recipe.launch)
    console = console or Console(quiet=not state.is_main_process)
    run_dir = Path(recipe.out)
    if state.is_main_process:
        _check_methods(recipe, Manifest.open(run_dir), restart=restart)
        make_data(recipe)
        load_source(recipe.data.train, "data.train")
        check_evaluation(recipe)  # what could not be evaluated must not be trained first
        make_backbone(recipe, console)
        write_text_atomic(run_dir / RESOLVED, dump_recipe(recipe))
    state.wait_for_everyone()
    manifest = Manifest.open(run_dir)
    if manifest.evaluation(recipe):
        console.say(f"already finished: {run_dir}")
        text = (run_dir / METRICS).read_text(encoding="utf-8")
        return RunOutcome(run_dir, Comparison.from_json(text), run_dir / "report.html")
    return _compare(recipe, manifest, console)


def evaluate(
    run_dir: str | Path, *, overrides: list[str] | None = None, console: Console | None = None
) -> RunOutcome:
    """Evaluate a finished run again, with `eval.*` settings changed if asked.

    Raises:
        RunError: no finished run under that name.
    """
    run_dir, console = Path(run_dir), console or Console()
    place = f"out={json.dumps(str(run_dir))}"
    recipe = load_recipe(run_dir / RESOLVED, [*(overrides or []), place])
    process_state(recipe.launch)
    manifest = Manifest.open(run_dir)
    _check_methods(recipe, manifest, restart=False)
    check_evaluation(recipe)
    for name in recipe.methods:
        if not manifest.is_done(name):
            raise RunError(f"{run_dir}: method {name!r} is not finished; run `mmadapt train` first")
    return _compare(recipe, manifest, console)


def _compare(recipe: AuroraRecipe, manifest: Manifest, console: Console) -> RunOutcome:
    run_dir, evaluated = Path(recipe.out), {}
    for name in recipe.methods:
        if not manifest.is_done(name):
            evaluated[name] = _train_method(recipe, name, manifest, console)
    # every process takes part in an evaluation; the main one writes
    baselines = _baselines(recipe, console) if recipe.eval.baseline else []
    for name in recipe.methods:
        if name not in evaluated:
            evaluated[name] = _evaluate_saved(recipe, name, console)
    if not process_state(recipe.launch).is_main_process:
        return RunOutcome(run_dir)
    rows = baselines + [_row(n, evaluated[n], manifest.stage(n)) for n in recipe.methods]
    comparison = Comparison(
        title=f"{recipe.task} on {Path(recipe.model.name).name}: {', '.join(recipe.methods)}",
        task=recipe.task,
        columns=columns(recipe),
        rows=rows,
        parameters=manifest.stage(next(iter(recipe.methods)))["parameters"],
        seed=recipe.seed,
        model=portable(recipe.model.name, recipe.out),
        data=portable(recipe.data.root or recipe.data.train.path, recipe.out),
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        versions=versions(),
        config=portable(recipe.model_dump(mode="json"), recipe.out),
    )
    page = write_comparison(run_dir, comparison)
    scores = {row.name: row.scores for row in rows}
    manifest.finish_evaluation(recipe, {"scores": scores, "report": page.name})
    return RunOutcome(run_dir, comparison, page)


def portable(value: Any, out: str) -> Any:
    """The value with `${out}` for the run directory: a record is the same wherever it was made."""
    return json.loads(json.dumps(value).replace(json.dumps(out)[1:-1], "${out}"))


def _train_method(
    recipe: AuroraRecipe, name: str, manifest: Manifest, console: Console
) -> dict[str, float]:
    """Train one method, fresh or from its newest checkpoint; returns its scores."""
    state = process_state(recipe.launch)
    folder = Path(recipe.out) / name
    backbone = load_backbone(recipe)
    total = sum(p.numel() for p in backbone.model.parameters())
    model = add_method(backbone.model, recipe, name)
    loss = objective(recipe, backbone, model)
    trained = trainable_parameters(model)
    if state.is_main_process:
        if manifest.stage(name) is None:  # leftovers of a method that was dropped
            shutil.rmtree(folder, ignore_errors=True)
        checkpoints.remove_incomplete(folder)
        details = {"versions": versions(), "git_commit": git_commit()}
        details |= {"processes": state.num_processes, "parameters": total, "trainable": trained}
        manifest.start_stage(recipe, name, details)
    state.wait_for_everyone()
    console.say(f"{name}: {trained:,} of {total:,} parameters are trained")
    trainer = _trainer(recipe, name, backbone, loss, state, console)
    found = checkpoints.latest(folder, world_size=state.num_processes)
    started = time.monotonic()
    if found is not None and found[1].last:
        load_trained(loss, found[0] / STATE)
        trainer.restore_state(found[0])
    else:
        if found is not None:
            console.say(f"{name}: resuming after step {found[1].step}")
        trainer.train(resume_from_checkpoint=str(found[0]) if found else None)
    seconds = time.monotonic() - started
    loss = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    if state.is_main_process:
        metrics = _metrics(trainer, seconds, resumed=found is not None)
        save_trained(loss, folder / STATE)
        if hasattr(model, "save_pretrained") and hasattr(model, "get_base_model"):
            model.save_pretrained(str(folder / "adapter"))
        metrics |= _memory(trainer, loss)
        manifest.finish_stage(name, metrics)
    state.wait_for_everyone()
    scores = evaluate_model(recipe, backbone, loss.model, console, name)
    trainer.accelerator.free_memory()
    del trainer, loss, model, backbone
    gc.collect()
    return scores


def _trainer(
    recipe: AuroraRecipe, name: str, backbone: Backbone, loss: Any, state: Any, console: Console
) -> ObjectiveTrainer:
    arguments = build_arguments(
        DEFAULTS | recipe.train,
        output_dir=str(Path(recipe.out) / name),
        learning_rate=recipe.methods[name].lr,
        seed=recipe.seed,
        use_cpu=state.device.type == "cpu",
        quiet=console.quiet,
    )
    return ObjectiveTrainer(
        loss,
        arguments,
        name=name,
        recipe=recipe,
        dataset=load_source(recipe.data.train, "data.train"),
        collator=collator(recipe, backbone, train=True),
    )


def _metrics(trainer: ObjectiveTrainer, seconds: float, *, resumed: bool) -> dict[str, Any]:
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "loss": [(entry["step"], entry["loss"]) for entry in history],
        "seconds": round(seconds, 3),  # of the process that finished; resumed took longer in all
        "resumed": resumed,
    }


def _memory(trainer: ObjectiveTrainer, loss: Any) -> dict[str, float | None]:
    """Counted on one batch of the trainer's size, in training mode as it was trained."""
    if trainer.optimizer is None or trainer.args.world_size > 1:
        return {"saved_mib": None, "state_mib": None, "peak_mib": None}
    rows = range(trainer.args.per_device_train_batch_size)
    dataset = trainer.train_dataset
    batch = trainer.data_collator([dataset[i % len(dataset)] for i in rows])
    loss.train()
    batch = {key: value.to(trainer.args.device) for key, value in batch.items()}
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    memory = training_memory(loss, optimizer, batch)
    return {"saved_mib": memory.saved, "state_mib": memory.state, "peak_mib": memory.peak}


def _baselines(recipe: AuroraRecipe, console: Console) -> list[MethodRow]:
    name, scores = chance(recipe)
    backbone = load_backbone(recipe)
    model = backbone.model.to(process_state(recipe.launch).device)
    untouched = evaluate_model(recipe, backbone, model, console, "frozen model")
    return [MethodRow(name, scores), MethodRow("frozen model", untouched)]


def _evaluate_saved(recipe: AuroraRecipe, name: str, console: Console) -> dict[str, float]:
    backbone = load_backbone(recipe)
    model = add_method(backbone.model, recipe, name)
    loss = objective(recipe, backbone, model)
    load_trained(loss, Path(recipe.out) / name / STATE)
    loss.to(process_state(recipe.launch).device)
    return evaluate_model(recipe, backbone, loss.model, console, name)


def _row(name: str, scores: dict[str, float], entry: dict[str, Any]) -> MethodRow:
    metrics = entry["metrics"]
    return MethodRow(
        name,
        scores,
        trainable=entry["trainable"],
        seconds=metrics["seconds"],
        saved_mib=metrics["saved_mib"],
        state_mib=metrics["state_mib"],
        peak_mib=metrics["peak_mib"],
        steps=metrics["steps"],
        loss=[tuple(point) for point in metrics["loss"]],
    )


def _check_methods(recipe: AuroraRecipe, manifest: Manifest, *, restart: bool) -> None:
    for name in manifest.stages():
        try:
            if name not in recipe.methods:
                raise RunError(
                    f"{recipe.out} holds method {name!r}, which the recipe does not have; choose "
                    "another `out` or start over with --restart"
                )
            manifest.check_stage(recipe, name)
        except RunError:
            if not restart:
                raise
            manifest.forget_stage(name)
            shutil.rmtree(Path(recipe.out) / name, ignore_errors=True)
