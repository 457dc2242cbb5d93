"""Optimizer groups of a CROME model: rates by component, no decay on biases and norms."""

import torch
from transformers import LlamaConfig

from mmadapt.models import (
    CromeForConditionalGeneration,
    CromeModelConfig,
    crome_components,
    set_crome_stage,
)
from mmadapt.train.components import parameter_groups
from mmadapt.train.config import Rates


def test_groups():
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2}
    config = CromeModelConfig(
        {**small, "image_size": 4, "patch_size": 2},
        {**small, "vocab_size": 9},
        LlamaConfig(vocab_size=9, **small),
        num_query_tokens=2,
        adapter_rank=2,
        adapter_bias=True,
        adapter_pre_norm=True,
    )
    with torch.device("meta"):
        model = CromeForConditionalGeneration(config)
    set_crome_stage(model, "instruct")
    parts = crome_components(model)
    rates = Rates(default=1e-3, qformer=1e-4)
    groups = parameter_groups(parts, rates, weight_decay=0.05, stage="instruct")
    names = {id(p): name for members in parts.values() for name, p in members}
    decayed = {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}
    plain = {names[id(p)] for g in groups if not g["weight_decay"] for p in g["params"]}
    assert {"query_tokens", "adapter.up", "adapter.gate", "image_projection.weight"} <= decayed
    assert {"adapter.gate_bias", "adapter.down_bias", "adapter.norm_weight"} <= plain
    assert not any(name.endswith("bias") or "norm" in name.lower() for name in decayed)
    assert decayed | plain == {n for n, p in model.named_parameters() if p.requires_grad}
    assert {g["component"]: g["lr"] for g in groups} == {
        "projector": 1e-3,
        "adapter": 1e-3,
        "qformer": 1e-4,
    }
