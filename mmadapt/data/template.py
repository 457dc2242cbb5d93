"""PILL's text around a conversation: LLaMA-2 chat marks, and where images go.

    [INST]<<SYS>>\\n{system}\\n<</SYS>>\\n\\n{question}[/INST]{answer}

No space stands between `[/INST]` and the answer. Each later turn is `[INST]{question}[/INST]`.
An image is the literal text `<image>` followed by a run of placeholder tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmadapt.data.sample import Message


@dataclass(frozen=True)
class ImageSlot:
    """The place of one image's placeholder run."""

    path: str


Part = str | ImageSlot


@dataclass(frozen=True)
class Turn:
    """A prompt (no two texts adjacent) and its answer; None when there is no answer yet."""

    prompt: tuple[Part, ...]
    answer: str | None


@dataclass(frozen=True)
class PillTemplate:
    """Messages -> turns. `image_text` is the text put before each image's placeholders."""

    image_text: str = "<image>"

    def turns(self, messages: Sequence[Message]) -> list[Turn]:
        """One Turn for each user message; the system text goes into the first.

        Raises ValueError when roles do not alternate user, assistant after an optional system
        message, or an image stands outside a user message.
        """
        system = ""
        if messages and messages[0]["role"] == "system":
            system = f"<<SYS>>\n{_text(messages[0])}\n<</SYS>>\n\n"
            messages = messages[1:]
        if not messages:
            raise ValueError("messages: expected at least one user message, got none")
        turns = []
        for number, message in enumerate(messages):
            expected = "assistant" if number % 2 else "user"
            if message["role"] != expected:
                raise ValueError(
                    f"messages: expected role {expected!r} at position {number} "
                    f"(not counting system), got {message['role']!r}"
                )
            if expected == "user":
                parts = [f"[INST]{system}", *self._parts(message), "[/INST]"]
                turns.append(Turn(merge_text(parts), None))
                system = ""
            else:
                turns[-1] = Turn(turns[-1].prompt, _text(message))
        return turns

    def render(self, messages: Sequence[Message], placeholder: str = "") -> str:
        """The whole conversation as one string, each image as `image_text` + `placeholder`."""
        text = ""
        for turn in self.turns(messages):
            text += "".join(placeholder if isinstance(p, ImageSlot) else p for p in turn.prompt)
            text += turn.answer or ""
        return text

    def _parts(self, message: Message) -> list[Part]:
        parts: list[Part] = []
        for part in message["content"]:
            if part["type"] == "image":
                parts += [self.image_text, ImageSlot(part["path"])]
            else:
                parts.append(_part_text(part))
        return parts


def merge_text(parts: Sequence[Part]) -> tuple[Part, ...]:
    """The parts with neighbouring texts joined and empty texts left out."""
    merged: list[Part] = []
    for part in parts:
        if part == "":
            continue
        if isinstance(part, str) and merged and isinstance(merged[-1], str):
            merged[-1] += part
        else:
            merged.append(part)
    return tuple(merged)


def _text(message: Message) -> str:
    return "".join(_part_text(part) for part in message["content"])


def _part_text(part: dict[str, Any]) -> str:
    if part["type"] != "text":
        raise ValueError(f"messages: expected a text part, got type {part['type']!r}")
    return part["text"]
