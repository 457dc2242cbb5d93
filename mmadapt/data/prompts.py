"""ScienceQA's prompt formats as PILL uses them (released code, after LaVIN and ScienceQA).

A format is `INPUT-OUTPUT`. Letters of the input: Q question, C context, M options, L lecture,
E solution; of the output: A answer, L lecture, E solution. Kept oddities: `AL` carries the
solution and `AE` the lecture; an output whose lecture and solution are empty ends in `BECAUSE:`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LETTERS = "ABCDE"
DEFAULT_FORMAT = "QCM-ALE"
DEFAULT_SYSTEM = (
    "You are an assistant for language and vision. Use the image, the question, the context and "
    "the options, and reply with your choice and the reason for it."
)

_OUTPUTS = ("A", "LA", "EA", "LEA", "ELA", "AL", "AE", "ALE")
PROMPT_FORMATS: tuple[str, ...] = (
    *(f"CQM-{output}" for output in _OUTPUTS),
    *(f"QCM-{output}" for output in _OUTPUTS),
    *("QCML-A", "QCME-A", "QCMLE-A", "QCLM-A", "QCEM-A", "QCLEM-A", "QCML-AE"),
)

_BECAUSE_TEXT = {
    "QCML": ("lecture",),
    "QCME": ("solution",),
    "QCMLE": ("lecture", "solution"),
    "QCLM": ("lecture",),
    "QCEM": ("solution",),
    "QCLEM": ("lecture", "solution"),
}
_ANSWER_TEXT = {
    "A": (),
    "AL": ("solution",),
    "AE": ("lecture",),
    "ALE": ("lecture", "solution"),
    "LA": ("lecture",),
    "EA": ("solution",),
    "LEA": ("lecture", "solution"),
    "ELA": ("solution", "lecture"),
}


def check_format(name: str) -> str:
    """`name` itself; ValueError when it is none of PROMPT_FORMATS."""
    if name not in PROMPT_FORMATS:
        raise ValueError(f"prompt: expected one of {', '.join(PROMPT_FORMATS)}; got {name!r}")
    return name


def question_body(problem: Mapping[str, Any], prompt: str, caption: str = "") -> str:
    """The lines after `Image:...`: question, context, options and, in some formats, a reason."""
    layout = check_format(prompt).split("-")[0]
    context = " ".join([problem["hint"], caption]).strip() or "N/A"
    options = " ".join(
        f"({letter}) {choice}" for letter, choice in zip(LETTERS, problem["choices"], strict=False)
    )
    lines = [f"Question: {problem['question']}", f"Context: {context}", f"Options: {options}"]
    if layout == "CQM":
        lines[:2] = lines[1::-1]
    elif layout in _BECAUSE_TEXT:
        because = f"BECAUSE: {_texts(problem, _BECAUSE_TEXT[layout])}"
        lines.insert(3 if layout.startswith("QCM") else 2, because)
    return _tidy("\n".join(lines))


def answer_text(problem: Mapping[str, Any], prompt: str, answer: int | None = None) -> str:
    """The target text; `answer` replaces the index of the true choice (random wrong answers)."""
    layout = check_format(prompt).split("-")[1]
    letter = LETTERS[problem["answer"] if answer is None else answer]
    sentence = f"The answer is {letter}."
    texts = _texts(problem, _ANSWER_TEXT[layout])
    if layout == "A":
        return sentence
    if layout.startswith("A"):
        return _tidy(f"{sentence} BECAUSE: {texts}")
    return _tidy(f"{texts} {sentence}")


def _texts(problem: Mapping[str, Any], fields: tuple[str, ...]) -> str:
    return " ".join(problem[field] for field in fields)


def _tidy(text: str) -> str:
    return text.replace("  ", " ").strip()
