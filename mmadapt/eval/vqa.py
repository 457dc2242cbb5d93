"""Scoring of visual question answering: VQAv2's soft accuracy, exact match, result files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmadapt.eval import _atomic
from mmadapt.eval.results import Accuracy

_ARTICLES = {"a", "an", "the"}
_NUMBERS = dict(
    zip(
        ("none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
        ("0", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9"),
        strict=True,
    )
) | {"ten": "10"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DECIMAL_COMMA = re.compile(r"(\d)(,)(\d)")
_PERIOD = re.compile(r"(?<!\d)\.(?!\d)")


def normalise_answer(text: str) -> str:
    """An answer as VQAv2's official scorer compares it, contractions left as they are.

    Punctuation goes (to a space between letters), articles go, number words become digits.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    has_comma = _DECIMAL_COMMA.search(text) is not None
    for mark in _PUNCTUATION:
        attached = f"{mark} " in text or f" {mark}" in text or has_comma
        text = text.replace(mark, "" if attached else " ")
    text = _PERIOD.sub("", text)
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(word for word in words if word not in _ARTICLES)


def soft_accuracy(answer: str, references: Sequence[str]) -> float:
    """VQA accuracy of one answer: mean over the annotators of min(1, agreeing others / 3).

    Raises:
        ValueError: no reference.
    """
    if not references:
        raise ValueError("references: expected at least one answer, got none")
    given = normalise_answer(answer)
    known = [normalise_answer(reference) for reference in references]
    shares = []
    for left_out in range(len(known)):
        others = known[:left_out] + known[left_out + 1 :]
        shares.append(min(1.0, others.count(given) / 3))
    return sum(shares) / len(shares)


def exact_match(answers: Mapping[Any, str], references: Mapping[Any, str]) -> Accuracy:
    """Answers that equal the reference of their question id, character by character.

    Raises:
        ValueError: a question without an answer.
    """
    missing = [key for key in references if key not in answers]
    if missing:
        raise ValueError(
            f"answers: {len(missing)} questions have none, the first is {missing[0]!r}"
        )
    return Accuracy(sum(answers[key] == text for key, text in references.items()), len(references))


def write_vqa_results(path: Path, answers: Iterable[tuple[Any, str]]) -> None:
    """`[{"question_id": ..., "answer": ...}, ...]` as the VQAv2 server takes it, one per question.

    Samplers that pad the last batch of a rank repeat questions; the first answer is kept.
    """
    unique: dict[Any, str] = {}
    for question_id, answer in answers:
        unique.setdefault(question_id, answer)
    records = [{"question_id": key, "answer": answer} for key, answer in unique.items()]
    _atomic.write_text(path, json.dumps(records, ensure_ascii=False) + "\n")
