"""Pretrain the small Llama on text only."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mmadapt.train.digits.corpus import texts

_BUCKETS = 4  # batches drawn together and sorted by length
# What a token counts in the loss. The letter of the answer is the one hard token of a text;
# prompts are mostly fixed words.
_PROMPT_WEIGHT, _ANSWER_WEIGHT, _LETTER_WEIGHT = 0.1, 1.0, 4.0


@dataclass(frozen=True)
class LanguageSettings:
    """Size of the model and length of its training. Found by a sweep over both."""

    hidden_size: int = 128
    intermediate_size: int = 256
    num_layers: int = 3
    num_heads: int = 8
    steps: int = 900
    batch_size: int = 64
    corpus_size: int = 24_000
    matrix_lr: float = 2e-3
    other_lr: float = 3e-3


@dataclass(frozen=True)
class _Corpus:
    ids: Tensor  # [N, S] int64, 0 behind the end
    weights: Tensor  # [N, S], the token's weight as a target
    lengths: Tensor  # [N]


def pretrain_language(
    model: Any,
    tokenizer: Any,
    settings: LanguageSettings,
    *,
    seed: int,
    text_options: dict[str, str],
    progress: Callable[[], None],
) -> None:
    """Train `model` (a LlamaForCausalLM) in place; `progress()` is called after each step.

    Matrices of the layers learn by Muon, which needs about a third of AdamW's steps until the
    model looks up an option's letter; embeddings and norms by AdamW.
    """
    if not hasattr(torch.optim, "Muon"):
        raise RuntimeError(
            f"torch: torch.optim.Muon needs torch >= 2.9, this is {torch.__version__}"
        )
    size = min(settings.corpus_size, settings.steps * settings.batch_size)
    corpus = _encode(tokenizer, size, seed, text_options)
    optimizers = _optimizers(model, settings)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: _decay(step, settings.steps))
        for o in optimizers
    ]
    model.train()
    for rows in islice(_batches(corpus, settings.batch_size, seed), settings.steps):
        _loss(model, corpus, rows).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        progress()
    model.eval()


def _batches(corpus: _Corpus, size: int, seed: int) -> Iterator[Tensor]:
    """Endless random rows; texts of similar length share a batch, which saves padding."""
    generator = torch.Generator().manual_seed(seed)
    lengths = corpus.lengths
    while True:
        rows = torch.randint(len(lengths), (_BUCKETS * size,), generator=generator)
        by_length = rows[lengths[rows].argsort(stable=True)].split(size)
        for bucket in torch.randperm(_BUCKETS, generator=generator):
            yield by_length[bucket]


def _loss(model: Any, corpus: _Corpus, rows: Tensor) -> Tensor:
    length = int(corpus.lengths[rows].max())
    ids = corpus.ids[rows, :length].to(model.device)
    weights = corpus.weights[rows, 1:length].to(model.device)
    logits = model(ids).logits[:, :-1]
    losses = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


def _encode(tokenizer: Any, size: int, seed: int, text_options: dict[str, str]) -> _Corpus:
    pairs = list(islice(texts(random.Random(seed), **text_options), size))
    prompts = tokenizer([prompt for prompt, _ in pairs], add_special_tokens=False)["input_ids"]
    answers = tokenizer([answer for _, answer in pairs], add_special_tokens=False)["input_ids"]
    letters = {i for token, i in tokenizer.get_vocab().items() if token[-1:] in "ABCDE"}
    verb = tokenizer(" is", add_special_tokens=False)["input_ids"][-1]
    width = 2 + max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.zeros(size, width, dtype=torch.int64)
    weights = torch.zeros(size, width)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        start, end = 1 + len(prompt), 2 + len(prompt) + len(answer)
        tokens = [tokenizer.bos_token_id, *prompt, *answer, tokenizer.eos_token_id]
        ids[row, :end] = torch.tensor(tokens)
        weights[row, :start] = _PROMPT_WEIGHT
        weights[row, start:end] = _ANSWER_WEIGHT
        for at in range(start + 1, end):
            if tokens[at - 1] == verb and tokens[at] in letters:
                weights[row, at] = _LETTER_WEIGHT
    return _Corpus(ids, weights, lengths=(weights > 0).sum(1))


def _optimizers(model: Any, settings: LanguageSettings) -> list[torch.optim.Optimizer]:
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and ".layers." in name else others).append(parameter)
    return [
        torch.optim.Muon(
            matrices, lr=settings.matrix_lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=settings.other_lr, betas=(0.9, 0.95), weight_decay=0.05),
    ]


def _decay(step: int, steps: int) -> float:
    """Warm-up over a tenth of the steps, then linear to 0."""
    return min(1.0, (step + 1) / (0.1 * steps)) * (1 - step / steps)
