"""Build, pretrain and save the frozen BLIPs of the Aurora demos: some hundred thousand weights.

The vision transformer learns to name what stands in each cell of a scene. The text encoder learns
to fill in words of source captions from the image, which teaches it where to look. Then the whole
model learns the task, retrieval or question answering, on source scenes of one or two digits.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mmadapt.data.blip_collate import tokenize
from mmadapt.data.caption_text import clean_caption, clean_question
from mmadapt.data.digit_scenes import (
    QUESTIONS,
    SOURCE_COUNTS,
    Scene,
    draw_scene,
    source_captions,
    vocabulary,
)
from mmadapt.data.image_transforms import CLIP_MEAN, CLIP_STD
from mmadapt.data.scene_images import SCENE_SIZE, SceneArtist
from mmadapt.models.aurora import RetrievalObjective, VQAObjective, alone

Task = Literal["retrieval", "vqa"]
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]", "[ENC]")
# transformers' default of 0.02 suits widths of 768 and more
_INIT_STD = 0.05
_CELLS = 4
_HIDDEN = 0.5  # share of words to fill in


@dataclass(frozen=True)
class BlipSettings:
    """Size of the model and length of its training."""

    hidden_size: int = 96
    num_layers: int = 3
    num_heads: int = 4
    patch_size: int = 12
    projection: int = 64
    vision_steps: int = 400
    word_steps: int = 400
    task_steps: int = 300
    batch_size: int = 64
    matrix_lr: float = 3e-3
    other_lr: float = 3e-3


def make_digits_blip(
    out_dir: str | os.PathLike[str],
    *,
    task: Task,
    seed: int = 0,
    vision_steps: int = BlipSettings.vision_steps,
    word_steps: int = BlipSettings.word_steps,
    task_steps: int = BlipSettings.task_steps,
    hidden_size: int = BlipSettings.hidden_size,
    num_layers: int = BlipSettings.num_layers,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Pretrain a BLIP for `task` on source scenes of training scans and save it with its tokenizer.

    The same arguments give the same weights on the same machine and number of threads.
    `progress` receives steps done and steps to do.

    Raises:
        ValueError: unknown task.
    """
    if task not in ("retrieval", "vqa"):
        raise ValueError(f"task: expected retrieval or vqa, got {task!r}")
    settings = replace(
        BlipSettings(),
        vision_steps=vision_steps,
        word_steps=word_steps,
        task_steps=task_steps,
        hidden_size=hidden_size,
        num_layers=num_layers,
    )
    total, done = vision_steps + word_steps + task_steps, 0

    def advance() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    with torch.random.fork_rng(), alone():  # in a distributed run one process makes it
        torch.manual_seed(seed)
        tokenizer = make_tokenizer()
        model = build_model(tokenizer, settings, task)
        source = SourceScenes(seed)
        _pretrain_vision(model, source, settings, advance)
        _pretrain_words(model, tokenizer, source, settings, advance)
        _pretrain_task(model, tokenizer, source, settings, task, advance)
    model.eval().save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)


def make_tokenizer() -> Any:
    """One token per word of the scenes' language, in BERT's layout; [DEC] and [ENC] as in BLIP."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {token: number for number, token in enumerate([*_SPECIAL, *vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(name, vocab[name]) for name in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        extra_special_tokens=["[DEC]", "[ENC]"],
    )


def build_model(tokenizer: Any, settings: BlipSettings, task: Task) -> Any:
    """A fresh model of Hugging Face's class for the task."""
    from transformers import BlipConfig, BlipForImageTextRetrieval, BlipForQuestionAnswering

    width = settings.hidden_size
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": settings.num_layers,
        "num_attention_heads": settings.num_heads,
        "initializer_range": _INIT_STD,
    }
    config = BlipConfig(
        vision_config={**sizes, "image_size": SCENE_SIZE, "patch_size": settings.patch_size},
        text_config={
            **sizes,
            "encoder_hidden_size": width,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 64,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.convert_tokens_to_ids("[DEC]"),
            "eos_token_id": tokenizer.sep_token_id,
            "sep_token_id": tokenizer.sep_token_id,
            "is_decoder": True,
        },
        image_text_hidden_size=settings.projection,
        initializer_range=_INIT_STD,
    )
    kind = BlipForImageTextRetrieval if task == "retrieval" else BlipForQuestionAnswering
    return kind(config)


class SourceScenes:
    """Endless source scenes of training scans, as batches."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(f"digit-scenes/{seed}/source")
        self._artist = SceneArtist("train")

    def scenes(self, count: int, sizes: tuple[int, ...] = SOURCE_COUNTS) -> list[Scene]:
        drawn = [
            [self._rng.randrange(10) for _ in range(self._rng.choice(sizes))] for _ in range(count)
        ]
        return [draw_scene(digits, self._rng) for digits in drawn]

    def pixels(self, scenes: list[Scene]) -> Tensor:
        """`[B, 3, SCENE_SIZE, SCENE_SIZE]`, normalised."""
        drawn = np.stack([self._artist.draw(scene, self._rng) for scene in scenes])
        grey = torch.from_numpy(drawn).float()[:, None] / 255
        mean, std = (torch.tensor(x)[:, None, None] for x in (CLIP_MEAN, CLIP_STD))
        return (grey - mean) / std

    def captions(self, scenes: list[Scene]) -> list[str]:
        return [clean_caption(self._rng.choice(source_captions(scene))) for scene in scenes]

    def questions(self, scenes: list[Scene]) -> list[tuple[str, str]]:
        asked = [self._rng.choice(list(QUESTIONS.values()))(s, self._rng) for s in scenes]
        return [(clean_question(question), answer) for question, answer in asked]


def _pretrain_vision(
    model: Any, source: SourceScenes, settings: BlipSettings, advance: Callable[[], None]
) -> None:
    """What stands in each cell: from the mean of its tokens, by a head that is thrown away."""
    vision = model.vision_model
    head = nn.Linear(settings.hidden_size, 11)
    optimizer = _Optimizer(nn.ModuleList([vision, head]), settings, settings.vision_steps)
    side = SCENE_SIZE // settings.patch_size
    vision.train()
    for _ in range(settings.vision_steps):
        scenes = source.scenes(settings.batch_size, sizes=(1, 2, 3, 4))
        tokens = vision(source.pixels(scenes)).last_hidden_state[:, 1:]
        grid = tokens.unflatten(1, (2, side // 2, 2, side // 2)).mean((2, 4)).flatten(1, 2)
        contents = [[scene.at(cell) for cell in range(_CELLS)] for scene in scenes]
        labels = torch.tensor([[10 if d is None else d for d in row] for row in contents])
        cross_entropy(head(grid).flatten(0, 1), labels.flatten()).backward()
        optimizer.step()
        advance()


def _pretrain_words(
    model: Any,
    tokenizer: Any,
    source: SourceScenes,
    settings: BlipSettings,
    advance: Callable[[], None],
) -> None:
    """Hidden words of captions from the image and the other words; the vision part stays."""
    text = model.text_encoder
    transform = nn.Linear(settings.hidden_size, settings.hidden_size)
    optimizer = _Optimizer(nn.ModuleList([text, transform]), settings, settings.word_steps)
    embeddings = text.embeddings.word_embeddings.weight
    mask_id = tokenizer.unk_token_id
    text.train()
    for _ in range(settings.word_steps):
        scenes = source.scenes(settings.batch_size)
        with torch.no_grad():
            seen = model.vision_model(source.pixels(scenes)).last_hidden_state
        batch = tokenize(tokenizer, source.captions(scenes), 35, "longest")
        ids, mask = batch["input_ids"], batch["attention_mask"]
        hidden = (torch.rand(ids.shape) < _HIDDEN) & (ids > len(_SPECIAL) - 1)
        states = text(
            ids.masked_fill(hidden, mask_id), attention_mask=mask, encoder_hidden_states=seen
        ).last_hidden_state
        logits = transform(states[hidden]) @ embeddings.T
        cross_entropy(logits, ids[hidden]).backward()
        optimizer.step()
        advance()


def _pretrain_task(
    model: Any,
    tokenizer: Any,
    source: SourceScenes,
    settings: BlipSettings,
    task: Task,
    advance: Callable[[], None],
) -> None:
    enc, dec = tokenizer.convert_tokens_to_ids(["[ENC]", "[DEC]"])
    objective: nn.Module
    if task == "retrieval":
        objective = RetrievalObjective(
            model, enc_token_id=enc, queue_size=8 * settings.batch_size, ice="off", alpha=0.0
        )
    else:
        objective = VQAObjective(model)
    optimizer = _Optimizer(objective, settings, settings.task_steps)
    objective.train()
    for _ in range(settings.task_steps):
        scenes = source.scenes(settings.batch_size)
        batch: dict[str, Tensor] = {"pixel_values": source.pixels(scenes)}
        if task == "retrieval":
            batch |= tokenize(tokenizer, source.captions(scenes), 35, "longest")
            # images of the same digits are no negatives of each other
            numbers = [int("1" + "".join(map(str, scene.digits))) for scene in scenes]
            batch["image_ids"] = torch.tensor(numbers)
        else:
            asked = source.questions(scenes)
            batch |= tokenize(tokenizer, [question for question, _ in asked], 35, "longest")
            batch["input_ids"][:, 0] = enc
            answers = tokenize(tokenizer, [answer for _, answer in asked], 35, "longest")
            answers["input_ids"][:, 0] = dec
            batch["answer_ids"] = answers["input_ids"]
            batch["answer_mask"] = answers["attention_mask"]
            batch["weights"] = torch.ones(len(scenes))
            batch["counts"] = torch.ones(len(scenes), dtype=torch.int64)
        objective(**batch).loss.backward()
        optimizer.step()
        advance()


class _Optimizer:
    """Muon for the layers' matrices, AdamW for the rest, warm-up and linear decay."""

    def __init__(self, module: nn.Module, settings: BlipSettings, steps: int) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise RuntimeError(
                f"torch: torch.optim.Muon needs torch >= 2.9, this is {torch.__version__}"
            )
        matrices, others = [], []
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                layer = parameter.ndim == 2 and (".layers." in name or ".layer." in name)
                (matrices if layer else others).append(parameter)
        self._parameters = matrices + others
        self._optimizers = [
            torch.optim.Muon(
                matrices, lr=settings.matrix_lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(others, lr=settings.other_lr, betas=(0.9, 0.95), weight_decay=0.05),
        ]
        self._schedules = [
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _decay(step, steps))
            for optimizer in self._optimizers
        ]

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        for optimizer, schedule in zip(self._optimizers, self._schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


def _decay(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / (0.1 * max(steps, 1))) * (1 - step / max(steps, 1))
