"""Text-only perplexity and accuracy against their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from mmadapt.eval import (
    Accuracy,
    Forgetting,
    TextOnly,
    TextProbe,
    generate_answers,
    probe_text,
    text_perplexity,
)


@pytest.fixture
def labelled(toy):
    return toy.Collator(with_labels=True, pad_side="right")


def nats_of(model, collator, sample):
    """Loss and count of one sample through the model's own loss."""
    batch = collator([sample])
    if "Llava" in type(model).__name__ and not (batch["input_ids"] == 3).any():
        del batch["pixel_values"]
    count = int((batch["labels"][:, 1:] != -100).sum())
    with torch.no_grad():
        return model(**batch).loss.item() * count, count


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_perplexity_is_over_tokens_not_batches(model, toy, labelled, dataset, batch_size):
    # replies of different length: a mean of batch means would differ
    replies = ["A.", "The answer is B.", "w1 w2", "The answer is A. w7 w7 w8", "B.", "w9", "w3 w4"]
    for sample, reply in zip(dataset, replies, strict=True):
        sample.messages[1]["content"][0]["text"] = reply
    pairs = [nats_of(model, labelled, sample) for sample in dataset]
    expected = math.exp(sum(n for n, _ in pairs) / sum(c for _, c in pairs))
    got = text_perplexity(model, labelled, dataset, batch_size=batch_size)
    assert got == pytest.approx(expected, rel=1e-4)


def test_text_only_keeps_order_and_drops_images(dataset):
    assert [sample.id for sample in TextOnly(dataset)] == ["1", "2", "6"]
    with pytest.raises(ValueError, match="no sample without an image"):
        TextOnly(dataset[:1])


def test_probe_uses_text_samples_alone(toy, prompts, labelled, dataset):
    model = toy.blip2().train()
    probe = probe_text(model, toy.Tokenizer(), prompts, labelled, dataset, max_new_tokens=3)
    assert probe.accuracy.total == 3
    assert probe.perplexity == text_perplexity(model, labelled, TextOnly(dataset))
    assert model.training


def test_collators_that_cannot_measure(toy, prompts, labelled, dataset):
    model = toy.blip2()
    with pytest.raises(ValueError, match="with_labels=True"):
        text_perplexity(model, prompts, dataset)

    def unlabelled(samples):
        batch = labelled(samples)
        return batch | {"labels": torch.full_like(batch["labels"], -100)}

    unlabelled.encoder = labelled.encoder
    with pytest.raises(ValueError, match="no token is labelled"):
        text_perplexity(model, unlabelled, dataset)


def test_deltas():
    change = Forgetting(TextProbe(Accuracy(9, 10), 1.5), TextProbe(Accuracy(8, 10), 2.0))
    assert change.accuracy_delta == pytest.approx(-10)
    assert change.perplexity_delta == 0.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_inputs_follow_the_model_to_its_device(model, toy, prompts, labelled, dataset):
    tokenizer = toy.Tokenizer()
    on_cpu = probe_text(model, tokenizer, prompts, labelled, dataset, max_new_tokens=3)
    on_gpu = probe_text(model.cuda(), tokenizer, prompts, labelled, dataset, max_new_tokens=3)
    assert on_gpu.accuracy == on_cpu.accuracy
    assert on_gpu.perplexity == pytest.approx(on_cpu.perplexity, rel=1e-3)
    seen, blank = (
        generate_answers(model, tokenizer, prompts, dataset, max_new_tokens=4, blank_images=flag)
        for flag in (False, True)
    )
    assert seen != blank
