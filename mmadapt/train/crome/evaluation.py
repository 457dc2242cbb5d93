"""After CROME's last stage: the new task, what it cost on the tasks before it, and text alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmadapt.eval import (
    Accuracy,
    Drift,
    EvalRow,
    Forgetting,
    RunResults,
    ScienceQAResult,
    Transfer,
    answer_drift,
    chance_row,
    evaluate_scienceqa,
    has_image,
    probe_text,
    problems_of,
    sample_answers,
)
from mmadapt.train.build import device, load_source
from mmadapt.train.config import DataSource, EvalConfig, Recipe
from mmadapt.train.crome.build import CromeBackbone, prepare_crome
from mmadapt.train.crome.lora import clear_lora
from mmadapt.train.crome.weights import load_trained
from mmadapt.train.manifest import Manifest
from mmadapt.train.ui import Console

ADAPTER = "adapter"  # folder of a stage's weights
_DRIFT_SAMPLES = 128


@dataclass
class _Evaluation:
    recipe: Recipe
    model: Any
    backbone: CromeBackbone
    console: Console

    def __post_init__(self) -> None:
        self.config: EvalConfig = self.recipe.eval
        length = self.config.max_length
        self.prompts = self.backbone.collator(max_length=length, with_labels=False)
        self.labelled = self.backbone.collator(max_length=length, with_labels=True)

    def data(self, source: DataSource) -> Any:
        return load_source(source, seed=self.recipe.seed, where="eval.data")

    def score(self, name: str, dataset: Any, **options: Any) -> ScienceQAResult:
        with self.console.progress(f"evaluating {name}") as progress:
            return evaluate_scienceqa(
                self.model,
                self.backbone.tokenizer,
                self.prompts,
                dataset,
                batch_size=self.config.batch_size,
                max_new_tokens=self.config.max_new_tokens,
                failures=self.config.failures,
                seed=self.recipe.seed,
                progress=progress,
                **options,
            )


class _Images:
    """The samples of a data set that have an image, the first `limit` of them."""

    def __init__(self, dataset: Any, limit: int | None = None) -> None:
        samples = (dataset[i] for i in range(len(dataset)))
        self._samples = [sample for sample in samples if has_image(sample.record)][:limit]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Any:
        return self._samples[index]


def evaluate_crome(
    recipe: Recipe,
    model: Any,
    backbone: CromeBackbone,
    manifest: Manifest,
    console: Console,
    source: DataSource,
) -> RunResults:
    """Everything the report shows of a CROME run; `model` holds the last stage's weights.

    `source` is what the last stage learnt. With a stage `task` behind `instruct`, the questions of
    the latter are asked again with the adapter from before, with the new one, and once more with
    the old one put back.
    """
    from mmadapt.train.evaluation import loss_curves, parameter_rows, run_info

    run = _Evaluation(recipe, model, backbone, console)
    target = run.data(source)
    tuned = run.score("tuned model", target, expected_count=run.config.expected_count)
    tuned.save(Path(recipe.out) / "answers")
    rows = [tuned.row("CROME")]
    blanked = None
    if run.config.blank_images:
        blanked = run.score("blanked images", target, blank_images=True)
        rows.append(blanked.row("images blanked"))
    earlier = _earlier_source(recipe, source)
    transfer, more = _transfer(run, target, tuned, earlier)
    rows[1:1] = more
    rows.append(chance_row(problems_of(target)))
    return RunResults(
        info=run_info(recipe, manifest),
        rows=rows,
        stages=loss_curves(manifest),
        forgetting=_text_alone(run, earlier or source),
        parameters=parameter_rows(manifest),
        samples=sample_answers(target, tuned, blanked=blanked, seed=recipe.seed),
        transfer=transfer,
    )


def _earlier_source(recipe: Recipe, source: DataSource) -> DataSource | None:
    """What stage `instruct` learnt, on the held-out split, if stage `task` came after it."""
    if "task" not in recipe.stages or "instruct" not in recipe.stages:
        return None
    questions = [s for s in recipe.stages["instruct"].data if s.reader == "scienceqa"]
    if not questions:
        return None
    changes = {"split": source.split, "limit": source.limit, "wrong_answers": {}}
    return DataSource.model_validate(questions[-1].model_dump() | changes)


def _transfer(
    run: _Evaluation, target: Any, tuned: ScienceQAResult, earlier: DataSource | None
) -> tuple[Transfer | None, list[EvalRow]]:
    if earlier is None:
        return None, []
    old, new = _swappers(run)
    questions = _Images(run.data(earlier))
    after = run.score("earlier questions, new adapter", questions)
    old()
    target_before = run.score("new task, old adapter", target)
    before = run.score("earlier questions, old adapter", questions)
    new()
    old()
    restored = run.score("earlier questions, old adapter again", questions)
    new()
    drift = _drift(run, _Images(questions, _DRIFT_SAMPLES), old, new)
    transfer = Transfer(
        target=(_all(target_before), _all(tuned)),
        source={name: (before.by_skill[name], after.by_skill[name]) for name in before.by_skill},
        drift=drift,
        restored=restored.by_skill,
    )
    rows = [
        target_before.row("before the task"),
        before.row("earlier questions, before"),
        after.row("earlier questions, after"),
    ]
    return transfer, rows


def _drift(
    run: _Evaluation, dataset: Any, old: Callable[[], None], new: Callable[[], None]
) -> Drift:
    with run.console.progress("drift of answers") as progress:
        return answer_drift(
            run.model,
            run.backbone.collator(max_length=run.config.max_length, with_labels=True),
            dataset,
            old,
            new,
            batch_size=run.config.batch_size,
            progress=progress,
        )


def _swappers(run: _Evaluation) -> tuple[Callable[[], None], Callable[[], None]]:
    """Two functions that put what was trained before the last stage, and after it, in place."""
    model, folder = run.model, Path(run.recipe.out) / "instruct" / ADAPTER
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    def before() -> None:
        load_trained(model, folder)
        clear_lora(model)

    return before, lambda: model.load_state_dict(trained, strict=False)


def _text_alone(run: _Evaluation, source: DataSource) -> Forgetting | None:
    """Questions without an image: the model before any training, made anew, and as it is now.

    The language model is frozen and gets no prefix, so that every bit has to agree.
    """
    dataset = run.data(source)
    has_text = any(not has_image(problem) for problem in problems_of(dataset).values())
    if not run.config.baseline or not has_text:
        return None

    def probe(name: str, model: Any) -> Any:
        with run.console.progress(f"text only, {name}") as progress:
            return probe_text(
                model,
                run.backbone.tokenizer,
                run.prompts,
                run.labelled,
                dataset,
                batch_size=run.config.batch_size,
                max_new_tokens=run.config.max_new_tokens,
                progress=progress,
            )

    state = torch.random.get_rng_state()
    _, untrained = prepare_crome(run.recipe)
    torch.random.set_rng_state(state)
    before = probe("before", untrained.to(device()))
    return Forgetting(before=before, after=probe("after", run.model))


def _all(result: ScienceQAResult) -> Accuracy:
    return result.table.columns["AVG"]
