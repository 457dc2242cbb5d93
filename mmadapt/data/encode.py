"""Sample -> token ids, labels and image spans, as PILL tokenises (released code).

Prompt and prompt + answer are encoded separately and only the prompt's length is used, so a
merge across their border shifts the border, never the ids. Text is encoded without special
tokens, BOS and EOS are put by hand, and every text between placeholder runs is encoded on its
own.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mmadapt.data.sample import Sample
from mmadapt.data.template import ImageSlot, Part, PillTemplate, Turn, merge_text

IGNORE = -100
_CACHED_TEXTS = 16384


@dataclass
class EncodedSample:
    """`ids` and `labels` of equal length; `spans` are (first position, path) of each image."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    spans: list[tuple[int, str]] = field(default_factory=list)

    def extend(self, ids: list[int], labels: list[int], spans: list[tuple[int, str]]) -> None:
        offset = len(self.ids)
        self.ids += ids
        self.labels += labels
        self.spans += [(start + offset, path) for start, path in spans]

    def truncate(self, length: int, num_image_tokens: int) -> int:
        """Keep the first `length` tokens, or fewer: an image that does not fit goes as a whole.

        Returns the number of images dropped. As in PILL the end of the row, EOS included, is
        what is lost.
        """
        kept = [span for span in self.spans if span[0] + num_image_tokens <= length]
        dropped = self.spans[len(kept) :]
        if dropped:
            length = min(length, dropped[0][0])
        del self.ids[length:], self.labels[length:]
        self.spans = kept
        return len(dropped)


class SampleEncoder:
    """Tokenises conversations for one tokenizer and one number of tokens per image.

    `strip_around_image` removes whitespace directly left and right of a placeholder run, which
    is what transformers 4.30.2, the version PILL was trained with, does. When padding shares
    its id with `<unk>`, `<unk>` in an answer carries no label (PILL's loss ignores that id).
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        image_token_id: int,
        num_image_tokens: int,
        template: PillTemplate | None = None,
        strip_around_image: bool = True,
    ):
        if num_image_tokens < 1:
            raise ValueError(f"num_image_tokens: expected at least 1, got {num_image_tokens}")
        if tokenizer.eos_token_id is None:
            raise ValueError("tokenizer: has no EOS token, answers could not end")
        self.tokenizer = tokenizer
        self.image_token_id = image_token_id
        self.num_image_tokens = num_image_tokens
        self.image_token = tokenizer.convert_ids_to_tokens(image_token_id)
        if template is None:
            template = PillTemplate(image_text="" if self.image_token == "<image>" else "<image>")
        self.template = template
        self.strip_around_image = strip_around_image
        unk = getattr(tokenizer, "unk_token_id", None)
        self.pad_id = _first_not_none(tokenizer.pad_token_id, unk, tokenizer.eos_token_id)
        self._unlabelled_id = unk if unk == self.pad_id else None
        self._cache: dict[str, array[int]] = {}
        self._bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

    def encode(self, sample: Sample) -> EncodedSample:
        """All turns, each with its own BOS and EOS; labels on answers and their EOS."""
        encoded = EncodedSample()
        for turn in self.template.turns(sample.messages):
            if turn.answer is None:
                raise ValueError(f"sample {sample.id!r}: the last question has no answer")
            self._add_pair(encoded, turn)
        return encoded

    def encode_prompt(self, sample: Sample) -> EncodedSample:
        """Earlier turns in full, then the last question without its answer; no labels."""
        encoded = EncodedSample()
        *earlier, last = self.template.turns(sample.messages)
        for turn in earlier:
            self._add_pair(encoded, turn)
        ids, spans = self._encode_parts(last.prompt)
        encoded.extend(ids, [IGNORE] * len(ids), spans)
        encoded.labels = [IGNORE] * len(encoded.ids)
        return encoded

    def _add_pair(self, encoded: EncodedSample, turn: Turn) -> None:
        prompt, _ = self._encode_parts(turn.prompt)
        ids, spans = self._encode_parts(merge_text([*turn.prompt, turn.answer or ""]))
        ids.append(self.tokenizer.eos_token_id)
        labels = [IGNORE] * len(prompt) + [
            IGNORE if token == self._unlabelled_id else token for token in ids[len(prompt) :]
        ]
        encoded.extend(ids, labels[: len(ids)], spans)

    def _encode_parts(self, parts: Sequence[Part]) -> tuple[list[int], list[tuple[int, str]]]:
        ids = list(self._bos)
        spans = []
        for number, part in enumerate(parts):
            if isinstance(part, ImageSlot):
                spans.append((len(ids), part.path))
                ids += [self.image_token_id] * self.num_image_tokens
                continue
            if self.strip_around_image and number > 0:
                part = part.lstrip()
            if self.strip_around_image and number + 1 < len(parts):
                part = part.rstrip()
            ids += self._encode_text(part)
        return ids, spans

    def _encode_text(self, text: str) -> list[int]:
        # The image token's own string inside a text is text: encoded in two pieces it cannot
        # turn into an image position.
        ids: list[int] = []
        for number, piece in enumerate(text.split(self.image_token)):
            if number > 0:
                ids += self._ids(self.image_token[:1]) + self._ids(self.image_token[1:])
            ids += self._ids(piece)
        return ids

    def _ids(self, text: str) -> list[int]:
        if not text:
            return []
        if text not in self._cache:
            if len(self._cache) >= _CACHED_TEXTS:
                self._cache.clear()
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            self._cache[text] = array("i", ids)
        return self._cache[text].tolist()


def _first_not_none(*values: int | None) -> int:
    return next(value for value in values if value is not None)
