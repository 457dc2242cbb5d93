"""Tiny models that Aurora adapts, and batches for them."""

import pytest
import torch
from peft import get_peft_model
from transformers import (
    BlipConfig,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipTextConfig,
    BlipVisionConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from mmadapt.peft import AuroraConfig

VOCAB, IMAGE, IMAGE_TOKENS = 50, 3, 4


def blip_config(dim=32, layers=2, heads=4, hidden=None, text_dim=None, **text):
    """BLIP's shapes in small; `text` goes to the text model."""
    return BlipConfig(
        text_config=BlipTextConfig(
            vocab_size=VOCAB,
            hidden_size=text_dim or dim,
            encoder_hidden_size=dim,
            intermediate_size=hidden or 4 * dim,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=32,
            bos_token_id=1,
            sep_token_id=2,
            eos_token_id=2,
            pad_token_id=0,
            **({"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} | text),
        ).to_dict(),
        vision_config=BlipVisionConfig(
            hidden_size=dim,
            intermediate_size=hidden or 4 * dim,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            image_size=16,
            patch_size=8,
            layer_norm_eps=1e-5,  # of the vectors' block; BLIP's checkpoints have 1e-6
        ).to_dict(),
        image_text_hidden_size=16,
    )


def llama_config(layers=2, kv_heads=2):
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def make_llava(layers=2):
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=llama_config(layers),
            image_token_id=IMAGE,
            image_seq_length=IMAGE_TOKENS,
        )
    )


MAKERS = {
    "retrieval": lambda **kw: BlipForImageTextRetrieval(blip_config(**kw)),
    "vqa": lambda **kw: BlipForQuestionAnswering(blip_config(**kw)),
    "llama": lambda **kw: LlamaForCausalLM(llama_config(**kw)),
    "llava": lambda **kw: make_llava(**kw),
}


def make_base(kind, seed=0, dtype=torch.float32, **kwargs):
    torch.manual_seed(seed)
    model = MAKERS[kind](**kwargs)
    for name, parameter in model.named_parameters():
        if "norm" not in name.lower():
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval().to(dtype)


def make_batch(kind, seed=1, dtype=torch.float32, rows=2):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCAB, (rows, 7), generator=generator)
    mask = torch.ones_like(ids)
    if kind in ("retrieval", "vqa"):
        ids[:, 0] = 1
        ids[-1, 5:], mask[-1, 5:] = 0, 0
        batch = {"input_ids": ids, "attention_mask": mask}
        batch["pixel_values"] = torch.randn(rows, 3, 16, 16, generator=generator).to(dtype)
        if kind == "vqa":
            batch["labels"] = torch.randint(4, VOCAB, (rows, 4), generator=generator)
        return batch
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}
    if kind == "llava":
        ids[:, 1 : 1 + IMAGE_TOKENS] = IMAGE
        batch["pixel_values"] = torch.randn(rows, 3, 8, 8, generator=generator).to(dtype)
    return batch


def make_aurora(kind, base=None, seed=2, adapter_name="default", **config):
    base = make_base(kind) if base is None else base
    torch.manual_seed(seed)
    options = {"rank": 8, "branch_dropout": 0.0, "init_weights": False} | config
    return get_peft_model(base, AuroraConfig(**options), adapter_name=adapter_name).eval()


def loss_of(kind, model, batch):
    output = model(**batch)
    return output.itm_score.square().mean() if kind == "retrieval" else output.loss


def scores(kind, model, batch):
    """What the model is for: matching scores, or answer logits or language model logits."""
    with torch.no_grad():
        if kind == "retrieval":
            return model(**batch).itm_score
        if kind == "vqa":
            return model(**batch).loss
        return model(**batch).logits


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def tiny():
    """Namespace of the builders above (test folders are no packages)."""

    class Tiny:
        kinds = tuple(MAKERS)
        base = staticmethod(make_base)
        batch = staticmethod(make_batch)
        aurora = staticmethod(make_aurora)
        loss = staticmethod(loss_of)
        scores = staticmethod(scores)
        gradients = staticmethod(gradients)
        blip_config = staticmethod(blip_config)

    return Tiny


@pytest.fixture(params=list(MAKERS))
def kind(request):
    return request.param


@pytest.fixture(params=["dense", "diagonal"])
def core(request):
    return request.param
