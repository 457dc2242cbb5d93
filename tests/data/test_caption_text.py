"""Text cleaning, to the character, and tokens at 35."""

import re

import pytest

from mmadapt.data.blip_collate import tokenize
from mmadapt.data.caption_text import clean_caption, clean_question

LONG = " ".join(f"w{i}" for i in range(60))


@pytest.mark.parametrize(
    "given, expected",
    [
        ("A Dog.", "a dog"),
        ('dog.cat!bird"fish(a)b*c#d:e;f~g', "dog cat bird fish a b c d e f g"),
        ("a man's hat, right? well-known - yes", "a man's hat, right? well-known - yes"),
        ("two  spaces\t\tand\n\nlines", "two spaces and lines"),
        ("one\nline", "one\nline"),  # a single newline inside is no run of whitespace
        (" edges . \n", "edges"),
        ("tab\t", "tab\t"),  # only newlines, then spaces, are stripped
        ("...", ""),
        ("Ünïcode ÀB.", "ünïcode àb"),
        (LONG, " ".join(f"w{i}" for i in range(30))),
    ],
)
def test_captions(given, expected):
    assert clean_caption(given) == expected


@pytest.mark.parametrize(
    "given, expected",
    [
        ("Is it A.B.C?", "is it abc?"),
        ('What: "this" (one)!', "what this one"),
        ("two  spaces stay  ", "two  spaces stay"),
        ("end \n", "end \n"),
        (LONG, " ".join(f"w{i}" for i in range(50))),
    ],
)
def test_questions(given, expected):
    assert clean_question(given) == expected


def test_videos_keep_forty_words():
    assert clean_caption(LONG, max_words=40) == " ".join(f"w{i}" for i in range(40))


@pytest.mark.parametrize(
    "text", ["a b", "Don't, stop!  (now)\n", LONG, "x . \n", " \n ", "#1: a;b~c"]
)
def test_against_the_released_expressions(text):
    """The three statements of BLIP's pre_caption and the two of pre_question, one by one."""
    caption = re.sub(r"([.!\"()*#:;~])", " ", text.lower())
    caption = re.sub(r"\s{2,}", " ", caption).rstrip("\n").strip(" ")
    assert clean_caption(text, 30) == " ".join(caption.split(" ")[:30])
    question = re.sub(r"([.!\"()*#:;~])", "", text.lower()).rstrip(" ")
    assert clean_question(text, 50) == " ".join(question.split(" ")[:50])


def test_truncation_keeps_the_separator(word_tokenizer):
    out = tokenize(word_tokenizer, ["a", LONG], 35, "max_length")
    ids, mask = out["input_ids"], out["attention_mask"]
    assert ids.shape == (2, 35)
    cls, sep = word_tokenizer.cls_token_id, word_tokenizer.sep_token_id
    assert ids[:, 0].tolist() == [cls, cls]
    assert ids[1, -1] == sep and int(mask[1].sum()) == 35
    assert ids[0, 2] == sep and int(mask[0].sum()) == 3
    assert tokenize(word_tokenizer, ["a"], 35, "longest")["input_ids"].shape == (1, 3)
