"""Questions about handwritten digits as pure functions of the digits: no image, no file.

Every question has the fields of a ScienceQA problem (`question`, `choices`, `answer`, `hint`,
`subject`, `grade`, ...). A kind looks at 0, 1 or 2 scans. The wording of a kind is fixed, and
choices and thresholds are drawn so that the text alone tells nothing about the answer: a model
that cannot see the scans stays at chance, 1 / len(choices).

Subjects follow ScienceQA's three values. Naming a digit is language science, parity and sums
are natural science, comparing is social science; so each subject holds questions with and
without scans.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Problem = dict[str, Any]

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Kind:
    """One kind of question: how many scans and digits it needs, and ScienceQA's labels for it."""

    num_scans: int
    num_digits: int
    subject: str
    topic: str
    grades: tuple[int, ...]
    build: Callable[[tuple[int, ...], random.Random], tuple[str, list[str], str]]
    """digits, rng -> question, choices with the right one first, solution"""
    hint: str = ""
    lecture: str = ""


def _parity(digit: int) -> str:
    return "odd" if digit % 2 else "even"


def _parity_choices(digit: int) -> list[str]:
    return [_parity(digit), _parity(digit + 1)]


def _other_digits(digit: int, count: int, rng: random.Random) -> list[str]:
    return [str(d) for d in rng.sample([d for d in range(10) if d != digit], count)]


def _sum_choices(total: int, rng: random.Random) -> list[str]:
    # The wrong total is a sum of random digits too: an offset from the true one would let a
    # blind model prefer the middle of 0..18, where sums are most frequent.
    other = total
    while other == total:
        other = rng.randrange(10) + rng.randrange(10)
    return [str(total), str(other)]


def _which_digit(digits, rng):
    (d,) = digits
    choices = [str(d), *_other_digits(d, 3, rng)]
    return "Which digit does the scan show?", choices, f"The scan shows {d}."


def _even_or_odd(digits, rng):
    (d,) = digits
    solution = f"The scan shows {d}. {d} is {_parity(d)}."
    return "Is the digit in the scan even or odd?", _parity_choices(d), solution


def _larger_than(digits, rng):
    (d,) = digits
    # d and 9 - d get the same thresholds and opposite answers: both are equally likely for
    # every threshold while the digits stay uniform.
    low = min(d, 9 - d)
    limit = rng.randint(low, 8 - low)
    larger = d > limit
    choices = ["yes", "no"] if larger else ["no", "yes"]
    verdict = "is larger than" if larger else "is not larger than"
    question = f"Is the digit in the scan larger than {limit}?"
    return question, choices, f"The scan shows {d}. {d} {verdict} {limit}."


def _compare_scans(digits, rng):
    a, b = digits
    _require_unequal(a, b)
    choices = ["the first scan", "the second scan"]
    if b > a:
        choices.reverse()
    verdict = f"{max(a, b)} is larger than {min(a, b)}. It is in {choices[0]}."
    solution = f"The scans show {a} and {b}. {verdict}"
    return "Which scan shows the larger digit?", choices, solution


def _sum_scans(digits, rng):
    a, b = digits
    question = "What is the sum of the digits in the two scans?"
    solution = f"The scans show {a} and {b}. {a} + {b} = {a + b}."
    return question, _sum_choices(a + b, rng), solution


def _addition(digits, rng):
    a, b = digits
    return f"What is {a} + {b}?", _sum_choices(a + b, rng), f"{a} + {b} = {a + b}."


def _larger_number(digits, rng):
    a, b = digits
    _require_unequal(a, b)
    large, small = max(a, b), min(a, b)
    question = f"Which number is larger, {a} or {b}?"
    return question, [str(large), str(small)], f"{large} is larger than {small}."


def _even_or_odd_word(digits, rng):
    (d,) = digits
    solution = f"{WORDS[d]} is {d}. {d} is {_parity(d)}."
    return f"Is {WORDS[d]} even or odd?", _parity_choices(d), solution


def _number_word(digits, rng):
    (d,) = digits
    choices = [str(d), *_other_digits(d, 2, rng)]
    return f"Which digit is {WORDS[d]}?", choices, f"{WORDS[d]} is {d}."


def _require_unequal(a: int, b: int) -> None:
    if a == b:
        raise ValueError(f"digits: a comparison needs two different digits, got {a} and {b}")


_LANGUAGE, _NATURAL, _SOCIAL = "language science", "natural science", "social science"
_EVEN = "Even digits are 0, 2, 4, 6 and 8."
_LARGER = "A larger number comes later when we count."
_SUM = "A sum is the total of two numbers."

KINDS: dict[str, Kind] = {
    "which digit": Kind(1, 1, _LANGUAGE, "reading", (1, 2, 3), _which_digit),
    "even or odd": Kind(1, 1, _NATURAL, "numbers", (2, 4, 7), _even_or_odd, hint=_EVEN),
    "larger than": Kind(1, 1, _SOCIAL, "order", (3, 5, 8), _larger_than, hint=_LARGER),
    "two-scan comparison": Kind(2, 2, _SOCIAL, "order", (4, 6, 9), _compare_scans),
    "two-scan sum": Kind(2, 2, _NATURAL, "numbers", (5, 10, 12), _sum_scans, lecture=_SUM),
    "addition": Kind(0, 2, _NATURAL, "numbers", (2, 8, 11), _addition, lecture=_SUM),
    "larger number": Kind(0, 2, _SOCIAL, "order", (3, 6, 10), _larger_number, hint=_LARGER),
    "even or odd in words": Kind(0, 1, _NATURAL, "numbers", (4, 7), _even_or_odd_word, hint=_EVEN),
    "number word": Kind(0, 1, _LANGUAGE, "reading", (1, 5, 9), _number_word),
}
VISUAL_KINDS: tuple[str, ...] = tuple(name for name, kind in KINDS.items() if kind.num_scans)
TEXT_KINDS: tuple[str, ...] = tuple(name for name, kind in KINDS.items() if not kind.num_scans)


def draw_digits(kind: str, rng: random.Random) -> tuple[int, ...]:
    """Digits a question of this kind can be asked about (a comparison gets different ones)."""
    count = _kind(kind).num_digits
    if kind in ("two-scan comparison", "larger number"):
        return tuple(rng.sample(range(10), count))
    return tuple(rng.randrange(10) for _ in range(count))


def make_question(
    kind: str, digits: Sequence[int], rng: random.Random, *, position: int | None = None
) -> Problem:
    """A ScienceQA problem about `digits`, without its image.

    `position` is the index the right choice gets; None draws it. `rng` also draws the wrong
    choices, the threshold, the grade and whether the kind's hint is shown (every second time).
    The result has all released fields; `image` is None and `split` is "".
    Raises ValueError for an unknown kind and for digits the kind cannot use.
    """
    spec = _kind(kind)
    digits = tuple(digits)
    if len(digits) != spec.num_digits or any(d not in range(10) for d in digits):
        raise ValueError(f"digits: {kind!r} takes {spec.num_digits} of 0..9, got {digits}")
    question, choices, solution = spec.build(digits, rng)
    right, wrong = choices[0], choices[1:]
    rng.shuffle(wrong)
    if position is None:
        position = rng.randrange(len(choices))
    if position not in range(len(choices)):
        raise ValueError(f"position: expected 0..{len(choices) - 1}, got {position}")
    return {
        "question": question,
        "choices": [*wrong[:position], right, *wrong[position:]],
        "answer": position,
        "hint": spec.hint if rng.random() < 0.5 else "",
        "image": None,
        "task": "closed choice",
        "grade": f"grade{rng.choice(spec.grades)}",
        "subject": spec.subject,
        "topic": spec.topic,
        "category": "Scans" if spec.num_scans else "Text",
        "skill": kind,
        "lecture": spec.lecture,
        "solution": solution,
        "split": "",
    }


def num_choices(kind: str) -> int:
    """How many choices a question of this kind has; its inverse is the accuracy of guessing."""
    rng = random.Random(0)
    return len(make_question(kind, draw_digits(kind, rng), rng)["choices"])


def describe(digits: Sequence[int]) -> str:
    """The caption of one or two scans, lower case with a free full stop as in CC3M."""
    if len(digits) == 1:
        return f"a scan of the digit {WORDS[digits[0]]} ."
    if len(digits) == 2:
        return f"two scans of the digits {WORDS[digits[0]]} and {WORDS[digits[1]]} ."
    raise ValueError(f"digits: a caption is about one or two scans, got {len(digits)}")


def _kind(name: str) -> Kind:
    if name not in KINDS:
        raise ValueError(f"kind: expected one of {list(KINDS)}, got {name!r}")
    return KINDS[name]
