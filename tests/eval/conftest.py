"""A tiny random Blip2 with a Llama text model, a word tokenizer and a stand-in for the collator.

The collator follows the contract of `mmadapt.data.PillCollator`, so that this room's tests fail
for this room's reasons alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch

IMAGE_TOKENS = 4
WORDS = [f"w{i}" for i in range(40)] + ["The", "answer", "is", "A.", "B.", "C."]


class WordTokenizer:
    """Ids 0 to 3 are <pad> <bos> <eos> <image>; the rest are words."""

    pad_token_id, bos_token_id, eos_token_id, image_token_id = 0, 1, 2, 3
    vocab_size = 4 + len(WORDS)

    def encode(self, text):
        return [4 + WORDS.index(word) for word in text.split()]

    def decode(self, tokens, skip_special_tokens=True):
        return " ".join(WORDS[t - 4] for t in tokens if t > 3)


class PixelProcessor:
    """Scales to [-1, 1]: black is -1, and zero is mid-grey."""

    def __call__(self, images, return_tensors):
        pixels = torch.from_numpy(np.array(images)).permute(2, 0, 1)[None]
        return {"pixel_values": pixels / 127.5 - 1}


@dataclass
class Sample:
    id: str
    messages: list
    record: dict = field(default_factory=dict)


def make_sample(key, text, image_seeds=(), reply="The answer is A.", **record):
    content = [{"type": "image", "path": str(seed)} for seed in image_seeds]
    content.append({"type": "text", "text": text})
    answer = [{"type": "text", "text": reply}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    defaults = {
        "question": text,
        "choices": ["yes", "no"],
        "answer": 0,
        "subject": "natural science",
        "grade": "grade2",
        "hint": "",
        "image": "image.png" if image_seeds else None,
    }
    return Sample(key, messages, defaults | record)


class ToyCollator:
    image_token_id = WordTokenizer.image_token_id

    def __init__(self, with_labels, pad_side):
        self.with_labels, self.pad_side = with_labels, pad_side
        self.image_processor = PixelProcessor()
        self.tokenizer = WordTokenizer()

    def __call__(self, samples):
        rows, labels, pixels = [], [], []
        for sample in samples:
            user, reply = sample.messages
            row = [self.tokenizer.bos_token_id]
            for part in user["content"]:
                if part["type"] == "image":
                    row += [self.image_token_id] * IMAGE_TOKENS
                    generator = torch.Generator().manual_seed(int(part["path"]))
                    pixels.append(torch.rand(3, 8, 8, generator=generator) * 2 - 1)
                else:
                    row += self.tokenizer.encode(part["text"])
            answer = [*self.tokenizer.encode(reply["content"][0]["text"]), 2]
            labels.append([-100] * len(row) + answer)
            rows.append(row + answer if self.with_labels else row)
        batch = {
            "input_ids": self._pad(rows, 0),
            "attention_mask": self._pad([[1] * len(row) for row in rows], 0),
            "pixel_values": torch.stack(pixels or [torch.zeros(3, 8, 8)]),
        }
        if self.with_labels:
            batch["labels"] = self._pad(labels, -100)
        return batch

    def _pad(self, rows, value):
        width = max(map(len, rows))
        left = self.pad_side == "left"
        padded = [
            [value] * (width - len(r)) + r if left else r + [value] * (width - len(r)) for r in rows
        ]
        return torch.tensor(padded)


def make_llama_config(transformers):
    return transformers.LlamaConfig(
        vocab_size=WordTokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def make_blip2():
    import transformers

    config = transformers.Blip2Config(
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
        },
        qformer_config={
            "vocab_size": 8,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "encoder_hidden_size": 16,
            "max_position_embeddings": 8,
        },
        text_config=make_llama_config(transformers).to_dict(),
        num_query_tokens=IMAGE_TOKENS,
        image_token_index=WordTokenizer.image_token_id,
        image_text_hidden_size=8,
    )
    config.image_token_id = WordTokenizer.image_token_id
    return _build(transformers.Blip2ForConditionalGeneration, config)


def make_llava():
    import transformers

    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
            projection_dim=8,
        ),
        text_config=make_llama_config(transformers),
        image_token_index=WordTokenizer.image_token_id,
        image_seq_length=IMAGE_TOKENS,
    )
    return _build(transformers.LlavaForConditionalGeneration, config)


def _build(model_class, config):
    """The same weights at every call, large: near-uniform logits make greedy a coin toss."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = model_class(config)
        for parameter in model.parameters():
            parameter.add_((0.6 if parameter.dim() > 1 else 0.1) * torch.randn_like(parameter))
        # <pad>, <bos> and <image> are never written: Llava refuses an image token without image
        model.get_output_embeddings().weight[[0, 1, 3]] = 0
    return model.eval()


@pytest.fixture(scope="session")
def toy():
    return SimpleNamespace(
        WORDS=WORDS,
        IMAGE_TOKENS=IMAGE_TOKENS,
        Collator=ToyCollator,
        Tokenizer=WordTokenizer,
        sample=make_sample,
        blip2=make_blip2,
        llava=make_llava,
    )


@pytest.fixture
def prompts(toy):
    return toy.Collator(with_labels=False, pad_side="left")


@pytest.fixture(params=["blip2", "llava"])
def model(request, toy):
    return getattr(toy, request.param)()


@pytest.fixture
def dataset(toy):
    """Seven prompts: no, one and two images, lengths 1 to 12."""
    lengths_images = [(3, 1), (12, 0), (1, 0), (7, 2), (5, 1), (2, 2), (9, 0)]
    return [
        toy.sample(str(i), " ".join(f"w{(i * 7 + j * 3) % 40}" for j in range(n)), range(i, i + k))
        for i, (n, k) in enumerate(lengths_images)
    ]
