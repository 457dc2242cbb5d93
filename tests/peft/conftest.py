"""Tiny models of every supported kind, and batches for them."""

import pytest
import torch
from peft import get_peft_model
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from mmadapt.peft import PillConfig

IMAGE = 3
IMAGE_TOKENS = 4
VOCAB = 60


def llama_config(kv_heads=2, layers=2, **kwargs):
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **kwargs,
    )


def make_llama(kv_heads=2, layers=2):
    return LlamaForCausalLM(llama_config(kv_heads, layers))


def make_blip2(kv_heads=2, layers=2):
    config = Blip2Config(
        vision_config=Blip2VisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        ).to_dict(),
        qformer_config=Blip2QFormerConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            encoder_hidden_size=16,
            vocab_size=8,
        ).to_dict(),
        text_config=llama_config(kv_heads, layers).to_dict(),
        num_query_tokens=IMAGE_TOKENS,
        image_token_id=IMAGE,
    )
    return Blip2ForConditionalGeneration(config)


def make_llava(kv_heads=2, layers=2):
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        ),
        text_config=llama_config(kv_heads, layers),
        image_token_id=IMAGE,
        image_seq_length=IMAGE_TOKENS,
    )
    return LlavaForConditionalGeneration(config)


MAKERS = {"llama": make_llama, "blip2": make_blip2, "llava": make_llava}


def make_base(kind, seed=0, **kwargs):
    torch.manual_seed(seed)
    model = MAKERS[kind](**kwargs)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def make_batch(kind, images=(True, True), length=10, seed=1):
    """Row i: four image tokens from position 1 on if `images[i]`, else text alone."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCAB, (len(images), length), generator=generator)
    ids[:, 0] = 1
    for row, image in enumerate(images):
        if image:
            ids[row, 1 : 1 + IMAGE_TOKENS] = IMAGE
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    if kind == "llama":
        batch["modality_ids"] = (ids == IMAGE).int()
    else:
        pixels = torch.randn(max(1, sum(images)), 3, 8, 8, generator=generator)
        batch["pixel_values"] = pixels
    if kind == "llava" and not any(images):
        del batch["pixel_values"]
    return batch


def prompt(batch):
    return {k: v for k, v in batch.items() if k != "labels"}


def left_pad(batch, pad):
    """The same prompts with `pad` padding tokens in front."""
    out = dict(batch)
    for name, value in (("input_ids", 0), ("attention_mask", 0), ("modality_ids", 0)):
        if name in batch:
            front = torch.full((batch[name].shape[0], pad), value, dtype=batch[name].dtype)
            out[name] = torch.cat([front, batch[name]], dim=1)
    return out


def make_pill(kind, base=None, seed=2, adapter_name="default", **config):
    base = make_base(kind) if base is None else base
    torch.manual_seed(seed)
    options = {"rank": 4, "init_weights": False} | config
    return get_peft_model(base, PillConfig(**options), adapter_name=adapter_name)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def tiny():
    """Namespace of the builders above (test folders are no packages)."""

    class Tiny:
        kinds = tuple(MAKERS)
        base = staticmethod(make_base)
        batch = staticmethod(make_batch)
        prompt = staticmethod(prompt)
        left_pad = staticmethod(left_pad)
        pill = staticmethod(make_pill)
        gradients = staticmethod(gradients)
        image = IMAGE

    return Tiny


@pytest.fixture(params=list(MAKERS))
def kind(request):
    return request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
