"""Scenes of handwritten digits as pure functions: what stands where, what is said and asked of it.

A scene is a square of two by two cells, of which some hold a scan. Everything is read in reading
order. Source scenes show one or two digits, target scenes two or three: what adapters are
compared on is to go from the first to the second, with other words.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mmadapt.data.digit_questions import WORDS

CELLS = ("top left", "top right", "bottom left", "bottom right")
SOURCE_COUNTS, TARGET_COUNTS = (1, 2), (2, 3)
COUNTS = ("zero", "one", "two", "three", "four")


@dataclass(frozen=True)
class Scene:
    """`cells`: cell number -> digit, ascending by cell, which is the reading order."""

    cells: tuple[tuple[int, int], ...]

    @property
    def digits(self) -> tuple[int, ...]:
        return tuple(digit for _, digit in self.cells)

    def at(self, cell: int) -> int | None:
        return dict(self.cells).get(cell)


def draw_scene(digits: Sequence[int], rng: random.Random) -> Scene:
    """These digits in random cells, their order kept."""
    return Scene(tuple(zip(sorted(rng.sample(range(4), len(digits))), digits, strict=True)))


def source_captions(scene: Scene) -> list[str]:
    """Captions of the source set: the words of the target set, for one or two digits."""
    words = [WORDS[digit] for digit in scene.digits]
    captions = [
        f"it reads {' '.join(words)}",
        f"{'a scan' if len(words) == 1 else 'scans'} of {_and(words)}",
        ", ".join(f"a {WORDS[digit]} at the {CELLS[cell]}" for cell, digit in scene.cells),
    ]
    return [*captions, " then ".join(words)] if len(words) > 1 else captions


def target_captions(scene: Scene) -> list[str]:
    """Captions of the target set, such as "a seven and a two"."""
    words = [WORDS[digit] for digit in scene.digits]
    return [
        _and([f"a {word}" for word in words]),
        " then ".join(words),
        f"it reads {' '.join(words)}",
    ]


def _and(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]


Question = tuple[str, str]
"""Question and answer."""


def _at_cell(scene: Scene, rng: random.Random) -> Question:
    cell = rng.choice([c for c, _ in scene.cells]) if rng.random() < 0.8 else rng.randrange(4)
    digit = scene.at(cell)
    return f"what is at the {CELLS[cell]}?", "nothing" if digit is None else WORDS[digit]


def _how_many(scene: Scene, rng: random.Random) -> Question:
    return "how many digits are there?", COUNTS[len(scene.cells)]


def _is_there(scene: Scene, rng: random.Random) -> Question:
    present = rng.random() < 0.5
    others = [d for d in range(10) if d not in scene.digits]
    digit = rng.choice(scene.digits if present else others)
    return f"is there a {WORDS[digit]}?", "yes" if present else "no"


def _ordinal(scene: Scene, rng: random.Random) -> Question:
    place, name = rng.choice([(0, "first"), (-1, "last")])
    return f"what is the {name} digit?", WORDS[scene.digits[place]]


def _largest(scene: Scene, rng: random.Random) -> Question:
    name, pick = rng.choice([("largest", max), ("smallest", min)])
    return f"what is the {name} digit?", WORDS[pick(scene.digits)]


QUESTIONS: dict[str, Callable[[Scene, random.Random], Question]] = {
    "cell": _at_cell,
    "count": _how_many,
    "presence": _is_there,
    "order": _ordinal,
    "size": _largest,
}
"""Kind -> question about a scene. Source and target sets ask all kinds of their own scenes."""

ANSWERS: tuple[str, ...] = (*WORDS, "nothing", "yes", "no")


def vocabulary() -> list[str]:
    """Every word and mark of captions, questions and answers, sorted."""
    rng = random.Random(0)
    texts = list(ANSWERS) + list(COUNTS)
    for _ in range(400):
        digits = [rng.randrange(10) for _ in range(rng.randint(1, 3))]
        scene = draw_scene(digits, rng)
        texts += source_captions(scene) + target_captions(scene)
        texts += [ask(scene, rng)[0] for ask in QUESTIONS.values()]
    spaced = " ".join(texts).replace(",", " , ").replace("?", " ? ")
    return sorted(set(spaced.split()))
