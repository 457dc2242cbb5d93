"""PILL's condition for bf16: a decoder block at the width of LLaMA-2-7B against fp32."""

import copy

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from mmadapt.peft import PillConfig

LENGTH, IMAGE = 288, slice(8, 40)


def block():
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=1,
            num_attention_heads=32,
        )
    )
    get_peft_model(model, PillConfig(rank=32))
    for name, parameter in model.named_parameters():
        if "mmadapt_pill_" in name and name.endswith((".up", "gate.default.gate")):
            torch.nn.init.normal_(parameter, std=0.02)
    return model.model.layers[0], model.model.rotary_emb


def run(layer, rotary, x, grad):
    """Block delta and every gradient, in fp32."""
    x = x.clone().requires_grad_()
    ids = torch.zeros(1, LENGTH, dtype=torch.int32)
    ids[:, IMAGE] = 1
    positions = rotary(x, torch.arange(LENGTH)[None])
    mask = torch.full((LENGTH, LENGTH), torch.finfo(x.dtype).min, dtype=x.dtype).triu(1)
    output = layer(
        x, attention_mask=mask[None, None], position_embeddings=positions, modality_ids=ids
    )
    output.backward(grad)
    found = {"delta": (output.float() - x.float()).detach(), "x": x.grad.float()}
    for name, parameter in layer.named_parameters():
        if "mmadapt_pill_" in name:
            found[name], parameter.grad = parameter.grad.float(), None
    return found


def errors(found, expected):
    return {n: ((found[n] - expected[n]).norm() / expected[n].norm()).item() for n in expected}


@pytest.mark.slow
def test_bf16_block(monkeypatch):
    layer, rotary = block()
    x, grad = torch.randn(1, LENGTH, 4096).bfloat16(), torch.randn(1, LENGTH, 4096).bfloat16()
    layer.bfloat16()
    exact = copy.deepcopy(layer).float()
    expected = run(exact, rotary, x.float(), grad.float())
    del exact
    found = run(layer, rotary, x, grad)
    error = errors(found, expected)
    monkeypatch.setenv("MMADAPT_BACKEND", "reference")
    unfused = errors(run(layer, rotary, x, grad), expected)
    for name, value in error.items():
        assert value <= (1e-2 if name in ("delta", "x") else 1.5e-2), (name, value)
        assert value <= 1.25 * unfused[name], (name, value, unfused[name])
        if name not in ("delta", "x"):
            pair = found[name].flatten(), expected[name].flatten()
            assert torch.nn.functional.cosine_similarity(*pair, dim=0) >= 0.9999, name
