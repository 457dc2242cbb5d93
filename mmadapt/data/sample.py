"""What every reader yields: one conversation in the Hugging Face chat format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """One conversation and where it came from.

    `messages`: HF chat messages; `content` is a list of `{"type": "text", "text": str}`,
    `{"type": "image", "path": str}` and `{"type": "video", "path": str}` parts (a video is a
    file or a folder of frames). Roles: an optional system message, then user and
    assistant in turn. `record`: the source record (a ScienceQA problem with its true answer,
    a LLaVA record), untouched.
    """

    id: str
    messages: list[Message]
    record: dict[str, Any] = field(repr=False)

    def image_paths(self) -> Iterator[str]:
        """Paths of the images, in the order of the conversation."""
        for message in self.messages:
            for part in message["content"]:
                if part["type"] == "image":
                    yield part["path"]


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def image_part(path: str) -> dict[str, str]:
    return {"type": "image", "path": path}


def video_part(path: str) -> dict[str, str]:
    return {"type": "video", "path": path}
