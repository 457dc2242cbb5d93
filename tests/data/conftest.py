from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

MERGES = [("]", "("), ("t", "h"), ("▁", "a"), ("th", "e")]


def llama_like_vocab() -> dict[str, int]:
    """Single characters and MERGES, after LLaMA's <unk> 0, <s> 1, </s> 2; no padding token."""
    characters = ["▁", "\n", *(chr(code) for code in range(33, 127))]
    tokens = ["<unk>", "<s>", "</s>", *characters, *("".join(pair) for pair in MERGES)]
    return {token: number for number, token in enumerate(tokens)}


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Behaves like LLaMA's: every encoded text gets its own leading-space piece."""
    tokenizer = Tokenizer(models.BPE(llama_like_vocab(), MERGES, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    fast.add_tokens([AddedToken("<image_placeholder>", special=True, normalized=False)])
    return fast


@pytest.fixture(scope="session")
def image_token_id(tokenizer) -> int:
    return tokenizer.convert_tokens_to_ids("<image_placeholder>")


class Processor:
    """Stands for an HF image processor: the image's colour on a 2x2 canvas; counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, images, return_tensors):
        assert return_tensors == "pt"
        self.calls += 1
        colours = [torch.tensor(image.getpixel((0, 0)), dtype=torch.float32) for image in images]
        return {"pixel_values": torch.stack([c.view(3, 1, 1).expand(3, 2, 2) for c in colours])}


@pytest.fixture
def processor() -> Processor:
    return Processor()


@pytest.fixture
def write_png():
    def write(path: Path, colour: int = 0) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (colour, colour, colour)).save(path)
        return path

    return write


PROBLEM = {
    "question": "Which is red?",
    "choices": ["the sky", "a rose", "grass"],
    "answer": 1,
    "hint": "Look at the picture.",
    "image": None,
    "task": "closed choice",
    "grade": "grade2",
    "subject": "natural science",
    "topic": "physics",
    "category": "Colour",
    "skill": "Name colours",
    "lecture": "Things have colours.",
    "solution": "Roses are red.",
    "split": "train",
}


@pytest.fixture
def problem():
    """problem(field=value, ...): a ScienceQA problem with some fields replaced."""
    return lambda **fields: {**PROBLEM, **fields}


@pytest.fixture
def write_scienceqa(tmp_path):
    """Write problems (id -> problem) in the released layout; the splits follow their `split`."""

    def write(problems: dict, root: Path | None = None) -> Path:
        root = root or tmp_path / "scienceqa"
        root.mkdir(parents=True, exist_ok=True)
        splits = {"train": [], "val": [], "test": [], "minitrain": []}
        for pid, problem in problems.items():
            splits[problem["split"]].append(pid)
        splits["trainval"] = splits["train"] + splits["val"]
        splits["minitrain"] = splits["train"][:1]
        (root / "problems.json").write_text(json.dumps(problems))
        (root / "pid_splits.json").write_text(json.dumps(splits))
        return root

    return write


@pytest.fixture
def word_tokenizer():
    """One token per word or mark, in BLIP's layout: [CLS] text [SEP]; unknown words are [UNK]."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]", "[ENC]"]
    vocab = {token: i for i, token in enumerate([*special, "a", "dog", "yes", "no", "is", "it"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        extra_special_tokens=["[DEC]", "[ENC]"],
    )
