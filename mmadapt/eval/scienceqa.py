"""ScienceQA's scorer: answer extraction, the nine-column table, chance level.

A problem is a record of `problems.json`: `choices`, `answer`, `subject`, `grade` ("grade1" ...
"grade12"), `hint`, `image`. Every function takes problems as {id: record}.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

from mmadapt.eval.results import Accuracy, EvalRow, ScienceQATable

Problem = Mapping[str, Any]
Problems = Mapping[str, Problem]
Predictions = Mapping[str, int | None]

SCIENCEQA_TEST_SIZE = 4241
"""Questions in ScienceQA's released test split; the published rows are over all of them."""

# The last dot is PILL's and a wildcard there: one more character must follow the letter, and a
# capitalised word counts as its first letter. Kept, so that scores compare with published ones.
_ANSWER = re.compile(r"The answer is ([A-Z]).")

_SUBJECTS = {"NAT": "natural science", "SOC": "social science", "LAN": "language science"}


def _grade(problem: Problem) -> int:
    match = re.fullmatch(r"grade(\d+)", str(problem["grade"]))
    if match is None or not 1 <= int(match[1]) <= 12:
        raise ValueError(f"grade: got {problem['grade']!r}, expected 'grade1' ... 'grade12'")
    return int(match[1])


def _has_hint(problem: Problem) -> bool:
    return bool(problem.get("hint"))


def has_image(problem: Problem) -> bool:
    """Whether the record names an image (ScienceQA: `image` is not null)."""
    return bool(problem.get("image"))


def _subject_is(subject: str) -> Callable[[Problem], bool]:
    return lambda problem: problem["subject"] == subject


_COLUMNS: dict[str, Callable[[Problem], bool]] = {
    **{column: _subject_is(subject) for column, subject in _SUBJECTS.items()},
    "TXT": _has_hint,
    "IMG": has_image,
    "NO": lambda problem: not _has_hint(problem) and not has_image(problem),
    "G1-6": lambda problem: _grade(problem) <= 6,
    "G7-12": lambda problem: _grade(problem) > 6,
    "AVG": lambda problem: True,
}

COLUMNS = tuple(_COLUMNS)
"""NAT SOC LAN TXT IMG NO G1-6 G7-12 AVG, the order in which papers print them."""


def extract_answer(text: str, num_choices: int) -> int | None:
    """Index of the choice named by the first "The answer is X." in a generated text.

    `text` is the generated part alone: a prompt may contain the sentence itself. Returns None
    when the sentence is missing or its letter is beyond `num_choices`; later occurrences are
    not looked at. Source: PILL's and LaVIN's evaluation scripts.
    """
    if not 1 <= num_choices <= 26:
        raise ValueError(f"num_choices: got {num_choices}, expected 1 to 26")
    match = _ANSWER.search(text)
    if match is None:
        return None
    index = ord(match[1]) - ord("A")
    return index if index < num_choices else None


def scienceqa_table(
    problems: Problems,
    predictions: Predictions,
    *,
    failures: Literal["wrong", "random"] = "wrong",
    seed: int = 0,
    expected_count: int | None = None,
) -> ScienceQATable:
    """Score predictions into ScienceQA's columns.

    Args:
        predictions: for every problem the predicted choice index, None where extraction failed.
        failures: "wrong" counts a failed extraction as a wrong answer. "random" replaces it by
            a uniform draw over the problem's choices, as the released script does, but seeded.
        seed: of those draws.
        expected_count: refuse any other number of predictions. Pass `SCIENCEQA_TEST_SIZE` for a
            number that is to stand beside published rows.

    Raises:
        ValueError: predictions missing or in excess, an index out of range, an unknown subject
            or grade, or a count other than `expected_count`.
    """
    if failures not in ("wrong", "random"):
        raise ValueError(f"failures: got {failures!r}, expected 'wrong' or 'random'")
    _check_predictions(problems, predictions, expected_count)
    rng = random.Random(seed)
    correct: dict[str, bool] = {}
    for key in sorted(problems):  # sorted: the draws must not depend on the order of the file
        prediction = predictions[key]
        if prediction is None and failures == "random":
            prediction = rng.randrange(len(problems[key]["choices"]))
        correct[key] = prediction == problems[key]["answer"]
    failed = sum(predictions[key] is None for key in problems)
    return ScienceQATable(_count(problems, correct), failed)


def chance_row(problems: Problems, name: str = "chance") -> EvalRow:
    """The expected score of a uniform guess: mean of 1 / number of choices over the items."""
    share = {key: 1 / len(problem["choices"]) for key, problem in problems.items()}
    table = ScienceQATable(_count(problems, share), failures=0)
    return EvalRow(name, table, expected=True, **breakdown(problems, share))


def breakdown(problems: Problems, correct: Mapping[str, float]) -> dict[str, Any]:
    """`by_skill`, `visual` and `text_only` of an `EvalRow` from a score per problem."""
    skills = sorted({p["skill"] for p in problems.values() if p.get("skill")})
    visual = [key for key, problem in problems.items() if has_image(problem)]
    text_only = [key for key, problem in problems.items() if not has_image(problem)]
    return {
        "by_skill": {
            skill: _accuracy([k for k, p in problems.items() if p.get("skill") == skill], correct)
            for skill in skills
        },
        "visual": _accuracy(visual, correct) if visual else None,
        "text_only": _accuracy(text_only, correct) if text_only else None,
    }


def _count(problems: Problems, correct: Mapping[str, float]) -> dict[str, Accuracy]:
    known = set(_SUBJECTS.values())
    for key, problem in problems.items():
        if problem["subject"] not in known:
            raise ValueError(
                f"problem {key}: subject is {problem['subject']!r}, expected one of {sorted(known)}"
            )
    return {
        column: _accuracy([key for key, p in problems.items() if belongs(p)], correct)
        for column, belongs in _COLUMNS.items()
    }


def _accuracy(keys: list[str], correct: Mapping[str, float]) -> Accuracy:
    return Accuracy(sum(correct[key] for key in keys), len(keys))


def _check_predictions(
    problems: Problems, predictions: Predictions, expected_count: int | None
) -> None:
    if expected_count is not None and len(predictions) != expected_count:
        raise ValueError(f"predictions: got {len(predictions)}, expected {expected_count}")
    missing, extra = problems.keys() - predictions.keys(), predictions.keys() - problems.keys()
    if missing or extra:
        raise ValueError(
            f"predictions: {len(missing)} missing (e.g. {sorted(missing)[:3]}), "
            f"{len(extra)} of unknown problems (e.g. {sorted(extra)[:3]})"
        )
    for key, prediction in predictions.items():
        choices = len(problems[key]["choices"])
        if prediction is not None and not 0 <= prediction < choices:
            raise ValueError(
                f"prediction of problem {key}: got {prediction}, expected 0 to {choices - 1} "
                "or None"
            )
