"""Text cleaning of BLIP and Aurora, to the character."""

from __future__ import annotations

import re

# Other marks, such as the comma, the apostrophe, the question mark and the hyphen, stay.
_MARKS = re.compile(r"([.!\"()*#:;~])")
_SPACES = re.compile(r"\s{2,}")


def clean_caption(text: str, max_words: int = 30) -> str:
    """Lower case, marks to spaces, runs of whitespace to one space, at most `max_words` words.

    Aurora keeps 30 words for images and 40 for videos.
    """
    text = _SPACES.sub(" ", _MARKS.sub(" ", text.lower()))
    return _first_words(text.rstrip("\n").strip(" "), max_words)


def clean_question(text: str, max_words: int = 50) -> str:
    """Lower case, marks deleted, spaces at the end stripped, at most `max_words` words.

    VQAv2 questions; the released code leaves those of MSRVTT-QA as they are.
    """
    return _first_words(_MARKS.sub("", text.lower()).rstrip(" "), max_words)


def _first_words(text: str, count: int) -> str:
    words = text.split(" ")
    return " ".join(words[:count]) if len(words) > count else text
