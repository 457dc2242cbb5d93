"""Text without images: what the small language model reads before it is frozen.

Questions in PILL's prompt layout, with a description in words where a scan would stand, and
the request to describe. After reading them the model can calculate and choose letters; what it
lacks is eyes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from mmadapt.data.digit_questions import KINDS, describe, draw_digits, make_question, num_choices
from mmadapt.data.digits_vqa import CAPTION_REQUEST
from mmadapt.data.prompts import answer_text, question_body
from mmadapt.data.sample import text_part
from mmadapt.data.template import PillTemplate

SYSTEM = ""
PROMPT = "QCM-EA"
"""The explanation comes before the letter, so a small model can calculate in steps."""

_CAPTION_SHARE = 0.12
_TEMPLATE = PillTemplate()

Text = tuple[str, str]
"""Prompt and answer."""


def texts(rng: random.Random, *, prompt: str = PROMPT, system: str = SYSTEM) -> Iterator[Text]:
    """Endless prompts and answers; a kind is asked the more often the more choices it has.

    Among two choices a model guesses its way; to look one of five up is what takes it longest.
    """
    kinds = list(KINDS)
    weights = [num_choices(kind) - 1 for kind in kinds]
    while True:
        if rng.random() < _CAPTION_SHARE:
            yield caption_text([rng.randrange(10) for _ in range(rng.choice((1, 2)))])
        else:
            (kind,) = rng.choices(kinds, weights)
            yield question_text(kind, rng, prompt=prompt, system=system)


def question_text(
    kind: str, rng: random.Random, *, prompt: str = PROMPT, system: str = SYSTEM
) -> Text:
    """A question of this kind; scans are described in words."""
    digits = draw_digits(kind, rng)
    problem = make_question(kind, digits, rng)
    seen = describe(digits) if KINDS[kind].num_scans else "N/A"
    body = question_body(problem, prompt)
    return _render(f"Image:{seen}.\n{body}", answer_text(problem, prompt), system)


def caption_text(digits: list[int]) -> Text:
    """The request to describe one or two scans, and the description."""
    description = describe(digits)
    request = CAPTION_REQUEST[len(digits)].replace("<image>\n", "")
    return _render(f"{description}{request}", description, "")


def _render(user: str, answer: str, system: str) -> Text:
    messages = [{"role": "user", "content": [text_part(user)]}]
    if system:
        messages.insert(0, {"role": "system", "content": [text_part(system)]})
    return _TEMPLATE.render(messages), answer
