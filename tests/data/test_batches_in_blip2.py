"""Collated batches in an unmodified Hugging Face BLIP-2 with a Llama language model."""

import numpy as np
import pytest
import torch
from transformers import Blip2Config, Blip2ForConditionalGeneration

from mmadapt.data import PillCollator, ScienceQA, write_digits_vqa

QUERIES = 4


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = Blip2Config(
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 16,
        },
        qformer_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "encoder_hidden_size": 16,
            "vocab_size": 8,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer),
        },
        num_query_tokens=QUERIES,
        image_token_index=tokenizer.convert_tokens_to_ids("<image_placeholder>"),
    )
    return Blip2ForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "digits"
    write_digits_vqa(root, train=60, val=1, test=1, captions=1)
    return ScienceQA(root, system="")


@pytest.fixture
def collator(tokenizer, image_token_id):
    return PillCollator(
        tokenizer,
        _pixels,
        image_token_id=image_token_id,
        num_image_tokens=QUERIES,
    )


def _pixels(images, return_tensors):
    pixels = [torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in images]
    return {"pixel_values": torch.stack(pixels)}


def pick(data, *counts):
    """Samples with these numbers of images."""
    numbered = [(len(list(sample.image_paths())), sample) for sample in data]
    return [next(sample for n, sample in numbered if n == count) for count in counts]


def run(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss, model.language_projection.weight.grad


def test_mixed_batch(model, data, collator):
    batch = collator(pick(data, 0, 2, 1))
    assert batch["pixel_values"].shape == (3, 3, 32, 32)
    loss, grad = run(model, batch)
    assert torch.isfinite(loss)
    assert grad.abs().sum() > 0


def test_text_only_batch_touches_the_projector_with_zero_gradient(model, data, collator):
    loss, grad = run(model, collator(pick(data, 0, 0)))
    assert torch.isfinite(loss)
    assert grad is not None and not grad.any()


def test_padding_does_not_change_a_samples_loss(model, data, collator):
    two, text = pick(data, 2, 0)
    with torch.no_grad():
        alone = [model(**collator([sample])).loss for sample in (two, text)]
        counts = [int((collator([s])["labels"][:, 1:] != -100).sum()) for s in (two, text)]
        together = model(**collator([two, text])).loss
    expected = (alone[0] * counts[0] + alone[1] * counts[1]) / sum(counts)
    assert together.item() == pytest.approx(expected.item(), abs=1e-6)
