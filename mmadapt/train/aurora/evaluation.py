"""Scores of a trained model on the recipe's test data, and what chance gives there."""

from __future__ import annotations

from collections import Counter, defaultdict
from math import comb
from typing import Any

import torch
from torch import Tensor, nn

from mmadapt.eval.reranking import rerank
from mmadapt.eval.vqa import soft_accuracy
from mmadapt.models.aurora import rank, world_size
from mmadapt.train.aurora.build import Backbone, collator, load_source, visual_loader
from mmadapt.train.aurora.config import AuroraRecipe
from mmadapt.train.errors import RecipeError
from mmadapt.train.ui import Console

RETRIEVAL_COLUMNS = [f"{side} R@{k}" for side in ("i2t", "t2i") for k in (1, 5, 10)]
VQA_COLUMNS = ["accuracy"]


def columns(recipe: AuroraRecipe) -> list[str]:
    return RETRIEVAL_COLUMNS if recipe.task == "retrieval" else VQA_COLUMNS


def check_evaluation(recipe: AuroraRecipe) -> None:
    """Raises RecipeError for test data or settings that could not be evaluated."""
    test = load_source(recipe.data.test, "data.test")
    if recipe.task == "retrieval":
        smaller = min(len(set(test.numbers)), len(test.texts))
        if recipe.eval.k_test > smaller:
            raise RecipeError(
                f"eval.k_test: expected at most {smaller}, the gallery's size, got "
                f"{recipe.eval.k_test}"
            )
    elif recipe.eval.inference == "rank":
        from mmadapt.data.answers import read_answer_list

        try:
            read_answer_list(recipe.data.answers)
        except ValueError as error:
            raise RecipeError(f"data.answers: {error}") from error


def evaluate_model(
    recipe: AuroraRecipe, backbone: Backbone, model: nn.Module, console: Console, name: str
) -> dict[str, float]:
    """Percentages by column."""
    test = load_source(recipe.data.test, "data.test")
    with console.progress(f"evaluating {name}") as progress:
        if recipe.task == "retrieval":
            return _retrieval(recipe, backbone, model, test, progress)
        return _vqa(recipe, backbone, model, test, progress)


def chance(recipe: AuroraRecipe) -> tuple[str, dict[str, float]]:
    """Name and scores of a system that does not see the images.

    Retrieval: the expectation of a random order. Question answering: to each question the
    answer it had most often in training.
    """
    test = load_source(recipe.data.test, "data.test")
    if recipe.task == "retrieval":
        counts = Counter(test.text_image)
        texts, images = len(test.texts), len(counts)
        scores = {}
        for k in (1, 5, 10):
            found = [1 - _missed(texts, c, k) for c in counts.values()]
            scores[f"i2t R@{k}"] = 100 * sum(found) / len(found)
            scores[f"t2i R@{k}"] = 100 * min(1.0, k / images)
        return "random order", scores
    train = load_source(recipe.data.train, "data.train")
    usual: dict[str, Counter] = defaultdict(Counter)
    overall: Counter = Counter()
    for sample in _records(train):
        for answer, weight in zip(sample.answers, sample.weights, strict=True):
            usual[sample.question][answer] += weight
            overall[answer] += weight
    given = [(usual.get(s.question) or overall).most_common(1)[0][0] for s in _records(test)]
    right = [_score(a, s) for a, s in zip(given, _records(test), strict=True)]
    return "question alone", {"accuracy": 100 * sum(right) / len(right)}


def _missed(total: int, relevant: int, k: int) -> float:
    """Probability that none of `relevant` among `total` is in the first k of a random order."""
    return comb(total - relevant, k) / comb(total, k) if total - relevant >= k else 0.0


def _records(dataset: Any) -> Any:
    return (dataset[i] for i in range(len(dataset)))


class _Images:
    """The pixels of a gallery's images by their number, fetched one at a time.

    Readers of one record per caption repeat an image; its first record counts.
    """

    def __init__(self, dataset: Any, visual: Any) -> None:
        self._dataset, self._visual = dataset, visual
        self._index: dict[int, int] = {}
        for index, number in enumerate(dataset.numbers):
            self._index.setdefault(number, index)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, number: int) -> Tensor:
        return self._visual(self._dataset[self._index[number]])


def _retrieval(
    recipe: AuroraRecipe, backbone: Backbone, model: nn.Module, test: Any, progress: Any
) -> dict[str, float]:
    from mmadapt.data.blip_collate import tokenize
    from mmadapt.models.aurora import InformativeContext

    settings, objective = recipe.eval, recipe.objective
    images = _Images(test, visual_loader(recipe, backbone, train=False))
    texts = tokenize(backbone.tokenizer, test.texts, recipe.inputs.max_length, "longest")
    result = rerank(
        model,
        images,
        texts["input_ids"],
        texts["attention_mask"],
        enc_token_id=backbone.enc_token_id,
        k_test=settings.k_test,
        similarity_weight=settings.similarity_weight,
        ice=InformativeContext(objective.ice),
        frame_aware=settings.frame_aware,
        batch_size=settings.batch_size,
        progress=progress,
    )
    found = result.metrics(torch.tensor(test.text_image))
    sides = {"i2t": found.image_to_text, "t2i": found.text_to_image}
    return {f"{side} R@{k}": sides[side][f"R@{k}"] for side in sides for k in (1, 5, 10)}


def _vqa(
    recipe: AuroraRecipe, backbone: Backbone, model: nn.Module, test: Any, progress: Any
) -> dict[str, float]:
    from mmadapt.data.answers import read_answer_list
    from mmadapt.models.aurora import (
        blip_of,
        encode_questions,
        generate_answers,
        rank_answers,
    )

    settings, blip = recipe.eval, blip_of(model)
    batches = collator(recipe, backbone, train=False)
    device = next(blip.parameters()).device
    candidates: list[str] = []
    if settings.inference == "rank":
        candidates = read_answer_list(recipe.data.answers)
        encoded = {k: v.to(device) for k, v in batches.answers(candidates).items()}
    right: list[float] = []
    own = _shard(len(test))
    model.eval()
    with torch.no_grad():
        for start in range(own.start, own.stop, settings.batch_size):
            rows = range(start, min(start + settings.batch_size, own.stop))
            batch = batches.questions([test[i] for i in rows])
            samples = batch.pop("samples")
            inputs = {key: value.to(device) for key, value in batch.items()}
            states = encode_questions(
                blip, inputs["pixel_values"], inputs["input_ids"], inputs["attention_mask"]
            )
            if settings.inference == "rank":
                chosen = rank_answers(
                    blip,
                    states,
                    encoded["answer_ids"],
                    encoded["answer_mask"],
                    k_test=min(settings.k_test, len(candidates)),
                )
                answers = [candidates[i] for i in chosen.tolist()]
            else:
                ids = generate_answers(
                    blip,
                    states,
                    dec_token_id=backbone.dec_token_id,
                    sep_token_id=backbone.sep_token_id,
                    pad_token_id=backbone.tokenizer.pad_token_id,
                )
                answers = backbone.tokenizer.batch_decode(ids[:, 1:], skip_special_tokens=True)
            right += [_score(a, s) for a, s in zip(answers, samples, strict=True)]
            progress(len(right), len(own))
    total = torch.tensor(sum(right), dtype=torch.float64, device=device)
    if world_size() > 1:
        torch.distributed.all_reduce(total)
    return {"accuracy": 100 * float(total) / len(test)}


def _shard(count: int) -> range:
    """This process's share of `count` questions."""
    return range(count * rank() // world_size(), count * (rank() + 1) // world_size())


def _score(answer: str, sample: Any) -> float:
    """VQAv2's accuracy where several annotators answered, else exact match."""
    references = sample.record.get("answer")
    if isinstance(references, str) or len(references) == 1:
        return float(answer == (references if isinstance(references, str) else references[0]))
    return soft_accuracy(answer, references)
