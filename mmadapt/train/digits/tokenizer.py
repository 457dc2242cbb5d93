"""A byte-level BPE tokenizer for the templates' language, with LLaMA's special ids."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

IMAGE_TOKEN = "<image>"
_SPECIAL = ("<unk>", "<s>", "</s>")
# Marks of the prompt are one token each, as chat marks of larger models are. Option letters too:
# the letter then stands right before its choice, which a small model learns to look up sooner.
_MARKS = ("[INST]", "[/INST]", "<<SYS>>\n", "\n<</SYS>>\n\n", *(f" ({c})" for c in "ABCDE"))


def train_tokenizer(texts: Iterable[str], *, vocab_size: int = 512) -> Any:
    """A `PreTrainedTokenizerFast`: `<unk>`=`pad`=0, BOS=1, EOS=2, `<image>` the last id."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in _MARKS])
    unk, bos, eos = _SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unk,
        pad_token=unk,
        bos_token=bos,
        eos_token=eos,
        extra_special_tokens=[IMAGE_TOKEN],
    )
