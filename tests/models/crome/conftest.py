"""Tiny CROME models of both kinds of language model, and batches for them."""

import pytest
import torch
from transformers import (
    Blip2VisionConfig,
    InstructBlipQFormerConfig,
    LlamaConfig,
    OPTConfig,
    T5Config,
)

from mmadapt.models import CromeForConditionalGeneration, CromeModelConfig

IMAGE, VOCAB = 3, 60
QUERIES, PATCHES = 3, 4


def text_config(kind):
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCAB}
    if kind == "llama":
        return LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=512,
            **ids,
        )
    if kind == "opt":
        return OPTConfig(
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
            max_position_embeddings=128,
            dropout=0.0,
            **ids,
        )
    return T5Config(
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        **ids,
    )


def make_config(kind="llama", *, image_size=8, layers=2, **options):
    small = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    options = {"num_query_tokens": QUERIES, "adapter_rank": 4} | options
    return CromeModelConfig(
        Blip2VisionConfig(
            **small,
            num_hidden_layers=layers,
            image_size=image_size,
            patch_size=4,
            initializer_range=0.1,
        ),
        InstructBlipQFormerConfig(**small, num_hidden_layers=2, vocab_size=VOCAB),
        text_config(kind),
        image_token_id=IMAGE,
        **options,
    )


def make_model(kind="llama", *, identity=False, seed=0, **options):
    torch.manual_seed(seed)
    model = CromeForConditionalGeneration(make_config(kind, **options))
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 or "bias" in name:
            torch.nn.init.normal_(parameter, std=0.15)
    if identity:
        torch.nn.init.zeros_(model.adapter.up)
    return model.eval()


def make_batch(model, images=(1, 1), text=8, answer=3, seed=1):
    """Row i: the placeholders of `images[i]` images, then text; the last tokens are the answer."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    before, behind = config.image_tokens
    width = config.num_image_tokens * max(images) + text
    ids = torch.zeros(len(images), width, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, count in enumerate(images):
        words = torch.randint(4, VOCAB, (text,), generator=generator).tolist()
        instruction, reply = words[: text - answer], words[text - answer :]
        tokens = [IMAGE] * before * count + instruction + [IMAGE] * behind * count + reply
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        labels[row, len(tokens) - answer : len(tokens)] = torch.tensor(reply)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if config.is_encoder_decoder:
        batch["labels"] = torch.randint(4, VOCAB, (len(images), answer), generator=generator)
    if sum(images):
        size = config.vision_config.image_size
        batch["pixel_values"] = torch.randn(sum(images), 3, size, size, generator=generator)
        batch["qformer_input_ids"] = torch.randint(1, VOCAB, (sum(images), 5), generator=generator)
    return batch


@pytest.fixture
def tiny():
    """Namespace of the builders above (test folders are no packages)."""

    class Tiny:
        config = staticmethod(make_config)
        model = staticmethod(make_model)
        batch = staticmethod(make_batch)
        image, vocab, queries, patches = IMAGE, VOCAB, QUERIES, PATCHES

    return Tiny


@pytest.fixture(params=["llama", "opt", "t5"])
def kind(request):
    return request.param
