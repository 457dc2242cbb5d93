"""The tuner on Hugging Face modules against vectors of the authors' released modules."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model, set_peft_model_state_dict
from safetensors import safe_open
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
)

from mmadapt.peft import PillConfig, convert_meta_llama, from_released

GOLDEN = Path(__file__).parents[1] / "golden"
HEADS, DIM, RANK, HIDDEN, VOCAB, EPS, QFORMER = 4, 64, 16, 176, 97, 1e-5, 48


def load(name):
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def section(vectors, name):
    return {k.removeprefix(name + "."): v for k, v in vectors.items() if k.startswith(name + ".")}


def llama_config(layers):
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=DIM,
        intermediate_size=HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        rms_norm_eps=EPS,
    )


def adapters(model):
    """Trained parameters by checkpoint name."""
    return {
        "base_model.model." + n.removeprefix("base_model.model.").replace(".default", ""): p
        for n, p in model.named_parameters()
        if "mmadapt_pill_" in n
    }


def relative(found, expected):
    return ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def check_gradients(model, released, base):
    """Every released adapter gradient, to 2e-5; zero where the released gradient is zero."""
    expected = from_released(released, base)
    parameters = adapters(model)
    assert len(expected) == len([n for n in released if "adapter" in n]) >= 10
    assert expected.keys() <= parameters.keys()
    for name, gradient in expected.items():
        found = parameters[name].grad
        if gradient.any():
            assert relative(found, gradient) <= 2e-5, name
        else:
            assert not found.any(), name


def one_layer(released):
    """A tuned one-layer LLaMA with the released weights of a block, and its only decoder layer."""
    base = LlamaForCausalLM(llama_config(1))
    model = get_peft_model(base, PillConfig(rank=RANK))
    weights = {f"layers.0.{name}": tensor for name, tensor in released.items()}
    result = base.load_state_dict(
        {wrapped(n): t for n, t in convert_meta_llama(weights, HEADS).items()}, strict=False
    )
    assert not result.unexpected_keys
    set_peft_model_state_dict(model, from_released(weights, base))
    return model, base.model.layers[0], base.model.rotary_emb


def wrapped(name):
    for wrapper in ("self_attn", "mlp"):
        name = name.replace(f".{wrapper}.", f".{wrapper}.base_layer.")
    return name


def causal(x, rotary):
    length = x.shape[1]
    mask = torch.full((length, length), torch.finfo(x.dtype).min).triu(1)[None, None]
    return {
        "attention_mask": mask,
        "position_embeddings": rotary(x, torch.arange(length)[None]),
    }


def zero_adapters():
    """A block's adapters that do nothing, for vectors of attention alone."""
    shapes = {
        "down_sampler": (RANK, DIM),
        "down_sampler_gate": (RANK, DIM),
        "up_sampler": (DIM, RANK),
    }
    return {
        f"{adapter}.{name}.weight": torch.zeros(shape)
        for adapter in ("adapter_attn", "vis_adapter_ffn", "txt_adapter_ffn")
        for name, shape in shapes.items()
    }


def test_attention():
    vectors = load("pill_attention")
    released = {f"attention.{k}": v for k, v in section(vectors, "param").items()}
    released |= zero_adapters()
    model, layer, rotary = one_layer(released)
    x = vectors["input.x"].requires_grad_()
    output, _ = layer.self_attn(
        x, **causal(x, rotary), modality_ids=vectors["input.is_image"].int()
    )
    assert relative(output, vectors["output"]) <= 2e-6
    output.backward(vectors["grad_output"])
    assert relative(x.grad, vectors["grad_input.x"]) <= 2e-5
    gate = adapters(model)["base_model.model.model.layers.0.self_attn.mmadapt_pill_gate.gate"]
    assert relative(gate.grad, vectors["grad.vis_adapter_gate.weight"]) <= 2e-5


def test_block():
    vectors = load("pill_block")
    model, layer, rotary = one_layer(section(vectors, "param"))
    x = vectors["input.x"].requires_grad_()
    output = layer(x, **causal(x, rotary), modality_ids=vectors["input.is_image"].int())
    assert relative(output, vectors["output"]) <= 2e-6
    output.backward(vectors["grad_output"])
    assert relative(x.grad, vectors["grad_input.x"]) <= 2e-5
    released = {f"layers.0.{k}": v for k, v in section(vectors, "grad").items()}
    check_gradients(model, released, model)


@pytest.mark.parametrize("stage", ["instruct", "align"])
def test_model(stage, monkeypatch):
    """The whole of Blip2 but for its vision tower and Q-Former, whose features are given."""
    vectors = load(f"pill_model_{stage}")
    released, is_image = section(vectors, "param"), vectors["input.is_image"]
    base = Blip2ForConditionalGeneration(
        Blip2Config(
            vision_config={"hidden_size": 8, "num_hidden_layers": 0, "image_size": 14},
            qformer_config={"hidden_size": QFORMER, "num_hidden_layers": 0, "vocab_size": 1},
            text_config=llama_config(3).to_dict(),
            num_query_tokens=32,
            image_token_id=unused_id(vectors["input.input_ids"], is_image),
        )
    )
    converted = convert_meta_llama(released, HEADS)
    assert not base.language_model.load_state_dict(converted, strict=False).unexpected_keys
    model = get_peft_model(base, PillConfig(rank=RANK, projector="linear", stage=stage))
    set_peft_model_state_dict(model, from_released(released, model))

    def features(pixel_values, **kwargs):
        projected = base.language_projection(vectors["input.qformer_features"])
        return SimpleNamespace(pooler_output=projected, qformer_outputs=None, vision_outputs=None)

    monkeypatch.setattr(base, "get_image_features", features)
    ids = vectors["input.input_ids"].masked_fill(is_image, base.config.image_token_id)
    labels = vectors["input.labels"].masked_fill(vectors["input.labels"] == 0, -100)
    model.train()
    # The released align gradients include the frozen parts'; ask for all of them.
    for parameter in adapters(model).values():
        parameter.requires_grad_(True)
    loss = model(pixel_values=torch.zeros(2, 3, 14, 14), input_ids=ids, labels=labels).loss
    assert abs(loss.item() / vectors["output"].item() - 1) <= 2e-6
    loss.backward()
    check_gradients(model, section(vectors, "grad"), model)
    if stage == "align":
        gates = [p for n, p in adapters(model).items() if "mmadapt_pill_gate" in n]
        assert len(gates) == 3 and all(gate.grad is None for gate in gates)


def unused_id(ids, is_image):
    used = set(ids[~is_image].tolist())
    return next(i for i in range(VOCAB) if i not in used)
