"""ScienceQA from a model to a table: generate, extract, score; and samples for the gallery."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from mmadapt.data import PillCollator
from mmadapt.eval._atomic import write_text
from mmadapt.eval._batches import Dataset, Progress
from mmadapt.eval.generation import generate_answers
from mmadapt.eval.results import Accuracy, EvalRow, SampleAnswer, ScienceQATable
from mmadapt.eval.scienceqa import Problem, breakdown, extract_answer, scienceqa_table


@dataclass(frozen=True)
class ScienceQAResult:
    """Predictions of one system and their score.

    `predictions` holds None where no valid letter was found, whatever the failure policy.
    """

    table: ScienceQATable
    predictions: dict[str, int | None]
    texts: dict[str, str]
    by_skill: dict[str, Accuracy]
    visual: Accuracy | None
    text_only: Accuracy | None

    @property
    def failures(self) -> int:
        """Answers that named no valid choice."""
        return self.table.failures

    def row(self, name: str) -> EvalRow:
        return EvalRow(name, self.table, self.by_skill, self.visual, self.text_only)

    def save(self, folder: str | Path) -> None:
        """Write `preds.json` {id: index or null} and `answer.json` {id: text} (PILL's names)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "preds.json", json.dumps(self.predictions, indent=1))
        write_text(folder / "answer.json", json.dumps(self.texts, indent=1, ensure_ascii=False))


def problems_of(dataset: Dataset) -> dict[str, Problem]:
    """{id: record} of a data set; a repeated id is a ValueError."""
    problems: dict[str, Problem] = {}
    for i in range(len(dataset)):
        sample = dataset[i]
        if sample.id in problems:
            raise ValueError(f"dataset: id {sample.id!r} occurs twice, expected unique ids")
        problems[sample.id] = sample.record
    return problems


def evaluate_scienceqa(
    model: nn.Module,
    tokenizer: Any,
    collator: PillCollator,
    dataset: Dataset,
    *,
    batch_size: int = 32,
    max_new_tokens: int = 64,
    blank_images: bool = False,
    failures: Literal["wrong", "random"] = "wrong",
    seed: int = 0,
    expected_count: int | None = None,
    progress: Progress | None = None,
) -> ScienceQAResult:
    """Generate, extract and score every sample. See `generate_answers`, `scienceqa_table`.

    Accuracy by skill, with and without image, always counts a failed extraction as wrong.
    """
    problems = problems_of(dataset)
    answers = generate_answers(
        model,
        tokenizer,
        collator,
        dataset,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        blank_images=blank_images,
        progress=progress,
    )
    texts = dict(zip(problems, answers, strict=True))
    predictions = {
        key: extract_answer(texts[key], len(problem["choices"]))
        for key, problem in problems.items()
    }
    table = scienceqa_table(
        problems, predictions, failures=failures, seed=seed, expected_count=expected_count
    )
    correct = {key: predictions[key] == problem["answer"] for key, problem in problems.items()}
    return ScienceQAResult(table, predictions, texts, **breakdown(problems, correct))


def sample_answers(
    dataset: Dataset,
    result: ScienceQAResult,
    *,
    blanked: ScienceQAResult | None = None,
    count: int = 12,
    seed: int = 0,
) -> list[SampleAnswer]:
    """A random draw of questions with the model's answers, one skill after the other.

    The draw depends on the seed alone and never on whether an answer was right.
    """
    samples = [dataset[i] for i in range(len(dataset))]
    random.Random(seed).shuffle(samples)
    groups: dict[str, list[Any]] = {}
    for sample in samples:
        groups.setdefault(sample.record.get("skill") or "", []).append(sample)
    rounds = max((len(group) for group in groups.values()), default=0)
    picked = [groups[s][i] for i in range(rounds) for s in sorted(groups) if i < len(groups[s])]
    return [_sample_answer(sample, result, blanked) for sample in picked[:count]]


def _sample_answer(
    sample: Any, result: ScienceQAResult, blanked: ScienceQAResult | None
) -> SampleAnswer:
    parts = [part for message in sample.messages for part in message["content"]]
    record = sample.record
    return SampleAnswer(
        id=sample.id,
        question=record["question"],
        choices=list(record["choices"]),
        answer=record["answer"],
        prediction=result.predictions[sample.id],
        text=result.texts[sample.id].strip(),
        images=[str(part["path"]) for part in parts if part["type"] == "image"],
        hint=record.get("hint") or "",
        skill=record.get("skill") or "",
        blanked_prediction=blanked.predictions[sample.id] if blanked else None,
    )
