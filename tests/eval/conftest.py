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
    def __init__(self, with_labels, pad_side):
        self.with_labels, self.pad_side = with_labels, pad_side
        self.pixels = SimpleNamespace(image_processor=PixelProcessor())
        self.encoder = SimpleNamespace(image_token_id=WordTokenizer.image_token_id)
        self.tokenizer = WordTokenizer()

    def __call__(self, samples):
        rows, labels, pixels = [], [], []
        for sample in samples:
            user, reply = sample.messages
            row = [self.tokenizer.bos_token_id]
            for part in user["content"]:
                if part["type"] == "image":
                    row += [WordTokenizer.image_token_id] * IMAGE_TOKENS
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


@pytest.fixture(scope="session")
def run_results(tmp_path_factory):
    """A run with every section filled; one question text tries to be markup."""
    return make_run_results(tmp_path_factory.mktemp("scans"))


def make_run_results(folder):
    from PIL import Image

    from mmadapt.eval import results as r

    scan = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    paths = [str(folder / name) for name in ("scan.png", "photo.jpg")]
    Image.fromarray(scan).save(paths[0])
    Image.fromarray(scan).resize((600, 300)).save(paths[1])

    def row(name, share, **kwargs):
        sizes = (800, 500, 300, 400, 530, 200, 600, 200, 800)
        names = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "AVG")
        table = r.ScienceQATable(
            {c: r.Accuracy(round(share * n), n) for c, n in zip(names, sizes, strict=True)}, 3
        )
        skills = ("which digit", "even or odd", "larger than", "two-scan comparison", "sum")
        by_skill = {
            s: r.Accuracy(round((share - 0.03 * i) * 106), 106) for i, s in enumerate(skills)
        }
        by_skill["arithmetic"] = r.Accuracy(266, 270)
        return r.EvalRow(
            name, table, by_skill, r.Accuracy(share * 530, 530), r.Accuracy(266, 270), **kwargs
        )

    def sample(i, **kwargs):
        defaults = {
            "id": str(i),
            "question": "Which digit does the scan show?",
            "choices": ["three", "seven", "nine", "two"],
            "answer": 1,
            "prediction": i % 3,
            "text": "The answer is B.\nBECAUSE: the scan shows a seven.",
            "skill": "which digit",
        }
        return r.SampleAnswer(**defaults | kwargs)

    return r.RunResults(
        info=r.RunInfo(
            title="PILL on digits-vqa",
            seed=1,
            model="Blip2 (4 layers)",
            data="digits-vqa",
            device="cpu",
            versions={"torch": "2.13.0", "transformers": "5.23.0"},
            wall_seconds={"align": 61.2, "instruct": 143.9, "evaluation": 3700},
            config={"method": {"type": "pill", "rank": 8}, "lr": 0.001},
        ),
        rows=[
            row("PILL", 0.93),
            row("images blanked", 0.34),
            row("base model, before", 0.3),
            row("chance", 0.28, expected=True),
        ],
        stages=[
            r.StageCurve("align", [(i, 3 / (1 + i / 9) + (i % 7) / 20) for i in range(120)], 61.2),
            r.StageCurve("instruct", [(i, 2 / (1 + i / 20) + (i % 5) / 20) for i in range(300)]),
        ],
        gate=r.GateProfile([0.05, 0.12, 0.31, 0.44, 0.63, 0.71]),
        forgetting=r.Forgetting(
            r.TextProbe(r.Accuracy(268, 270), 1.2), r.TextProbe(r.Accuracy(266, 270), 1.25)
        ),
        parameters=[
            r.ComponentRow("projector", 12_288, {"align": 12_288, "instruct": 12_288}),
            r.ComponentRow("vision_expert", 98_304, {"align": 98_304, "instruct": 98_304}),
            r.ComponentRow("gate", 4_096, {"instruct": 4_096}),
            r.ComponentRow("language_model", 3_200_000),
        ],
        samples=[
            sample(0, images=[paths[0]]),
            sample(1, images=paths, skill="sum", blanked_prediction=2, hint="Add both numbers."),
            sample(2, question="<script>alert(1)</script> & <b>", skill="arithmetic"),
            sample(3, prediction=None, text="no idea"),
        ],
        ablation=r.Ablation(
            ["visual", "text-only"],
            [0, 1, 2],
            [
                r.AblationRow("PILL", {"visual": [93.0, 92.1, 93.9], "text-only": [98, 99, 98.5]}),
                r.AblationRow("no gate", {"visual": [90.1, 91, 90.2], "text-only": [97, 98, 98]}),
                r.AblationRow(
                    "linear adapter", {"visual": [88, 89, 85], "text-only": [98, 98, 97]}
                ),
            ],
        ),
    )
