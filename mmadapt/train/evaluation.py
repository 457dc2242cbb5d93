"""After the last stage: score the tuned model, its blind twin, chance and forgetting; report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mmadapt.eval import (
    ComponentRow,
    EvalRow,
    Forgetting,
    GateProfile,
    RunInfo,
    RunResults,
    ScienceQAResult,
    StageCurve,
    chance_row,
    evaluate_scienceqa,
    probe_text,
    problems_of,
    sample_answers,
    write_report,
)
from mmadapt.train.build import collator, load_source
from mmadapt.train.build import device as current_device
from mmadapt.train.config import DataSource, EvalConfig, Recipe
from mmadapt.train.errors import RecipeError
from mmadapt.train.manifest import Manifest
from mmadapt.train.ui import Console
from mmadapt.train.versions import versions

PROFILE_SAMPLES = 64


def evaluation_source(recipe: Recipe) -> DataSource:
    """What is evaluated: `eval.data`, or the last ScienceQA source with `eval.split`.

    Raises:
        RecipeError: neither is there, or not a ScienceQA source.
    """
    config = _config(recipe)
    changes: dict[str, Any] = {}
    if config.limit is not None:
        changes["limit"] = config.limit
    if config.prompt is not None:
        changes["prompt"] = config.prompt
    if config.data is not None:
        if config.data.reader != "scienceqa":
            raise RecipeError(
                f"eval.data.reader: the scorer needs scienceqa, got {config.data.reader!r}"
            )
        return DataSource.model_validate(config.data.model_dump() | changes)
    sources = [s for stage in recipe.stages.values() for s in stage.data if s.reader == "scienceqa"]
    if not sources:
        raise RecipeError(
            "eval.data: missing, and no stage reads a scienceqa source to take it from; name one "
            "or set eval=null"
        )
    changes = {"split": config.split, "limit": None, "wrong_answers": {}} | changes
    return DataSource.model_validate(sources[-1].model_dump() | changes)


def _config(recipe: Recipe) -> EvalConfig:
    if recipe.eval is None:
        raise RecipeError("eval: is null, nothing to evaluate")
    return recipe.eval


def evaluate_run(
    recipe: Recipe, model: Any, pretrained: Any, manifest: Manifest, console: Console
) -> RunResults:
    """Everything the report shows about a trained model, in `set_stage("instruct")` or "align"."""
    config, source = _config(recipe), evaluation_source(recipe)
    if recipe.method.type == "crome":
        from mmadapt.train.crome.evaluation import evaluate_crome

        return evaluate_crome(recipe, model, pretrained, manifest, console, source)
    dataset = load_source(source, seed=recipe.seed, where="eval.data")
    prompts = collator(pretrained, max_length=config.max_length, with_labels=False)
    labelled = collator(pretrained, max_length=config.max_length, with_labels=True)

    def score(name: str, **options: Any) -> ScienceQAResult:
        with console.progress(f"evaluating {name}") as progress:
            return evaluate_scienceqa(
                model,
                pretrained.tokenizer,
                prompts,
                dataset,
                batch_size=config.batch_size,
                max_new_tokens=config.max_new_tokens,
                failures=config.failures,
                seed=recipe.seed,
                expected_count=config.expected_count,
                progress=progress,
                **options,
            )

    tuned = score("tuned model")
    tuned.save(Path(recipe.out) / "answers")
    rows = [tuned.row("PILL")]
    blanked = score("blanked images", blank_images=True) if config.blank_images else None
    if blanked is not None:
        rows.append(blanked.row("images blanked"))
    rows.append(chance_row(problems_of(dataset)))
    return RunResults(
        info=run_info(recipe, manifest),
        rows=rows,
        stages=loss_curves(manifest),
        gate=_gate_profile(model, labelled, dataset, config),
        forgetting=_forgetting(model, pretrained, prompts, labelled, dataset, config, console),
        parameters=parameter_rows(manifest),
        samples=sample_answers(dataset, tuned, blanked=blanked, seed=recipe.seed),
    )


def _forgetting(
    model: Any,
    pretrained: Any,
    prompts: Any,
    labelled: Any,
    dataset: Any,
    config: EvalConfig,
    console: Console,
) -> Forgetting | None:
    """The text-only questions with the adapter off, which is the frozen model, and on."""
    has_text = any(not problem.get("image") for problem in problems_of(dataset).values())
    if not config.baseline or not has_text:
        return None

    def probe(name: str) -> Any:
        with console.progress(f"text only, {name}") as progress:
            return probe_text(
                model,
                pretrained.tokenizer,
                prompts,
                labelled,
                dataset,
                batch_size=config.batch_size,
                max_new_tokens=config.max_new_tokens,
                progress=progress,
            )

    with model.disable_adapter():
        before = probe("before")
    return Forgetting(before=before, after=probe("after"))


def _gate_profile(
    model: Any, labelled: Any, dataset: Any, config: EvalConfig
) -> GateProfile | None:
    """Mean |tanh gate| per layer over the image tokens of a few held-out samples."""
    from mmadapt.peft import components, gate_profile

    if not components(model).get("gate"):
        return None
    chosen = [i for i, p in enumerate(problems_of(dataset).values()) if p.get("image")]
    chosen = chosen[:PROFILE_SAMPLES]
    if not chosen:
        return None
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    with torch.no_grad(), gate_profile(model) as profile:
        for start in range(0, len(chosen), config.batch_size):
            batch = labelled([dataset[i] for i in chosen[start : start + config.batch_size]])
            batch.pop("labels")
            model(**{key: value.to(device) for key, value in batch.items()})
    model.train(training)
    return GateProfile(profile.mean_abs())


def run_info(recipe: Recipe, manifest: Manifest) -> RunInfo:
    seconds = {
        name: entry["metrics"]["seconds"]
        for name, entry in manifest.stages().items()
        if entry["status"] == "done"
    }
    device = torch.cuda.get_device_name() if current_device().type == "cuda" else "CPU"
    return RunInfo(
        title=f"{recipe.method.type} on {Path(recipe.model.name).name}",
        seed=recipe.seed,
        model=recipe.model.name,
        data=recipe.data.root or "",
        device=device,
        versions=versions(),
        wall_seconds=seconds,
        config=recipe.model_dump(mode="json"),
    )


def loss_curves(manifest: Manifest) -> list[StageCurve]:
    return [
        StageCurve(name, [tuple(p) for p in e["metrics"]["loss"]], e["metrics"]["seconds"])
        for name, e in manifest.stages().items()
        if e["status"] == "done"
    ]


def parameter_rows(manifest: Manifest) -> list[ComponentRow]:
    """Parameters by component, from what each stage recorded when it began."""
    stages = manifest.stages()
    totals = {name: n for entry in stages.values() for name, n in entry["parameters"].items()}
    return [
        ComponentRow(
            name, total, {stage: entry["trainable"].get(name, 0) for stage, entry in stages.items()}
        )
        for name, total in totals.items()
    ]


def report(results: RunResults, run_dir: Path) -> Path:
    """Write report.html, the pictures and metrics.json; returns the page's path."""
    return write_report(run_dir, results).html


def summary(rows: list[EvalRow]) -> dict[str, dict[str, float]]:
    """Percentages by row and column, for the manifest."""
    return {
        row.name: {c: row.table[c] for c, a in row.table.columns.items() if a.total} for row in rows
    }
