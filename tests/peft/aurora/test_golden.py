"""The tuner on Hugging Face's BLIP against vectors of the authors' released modules."""

from pathlib import Path

import pytest
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from transformers import BlipForImageTextRetrieval

from mmadapt.peft import AuroraConfig, aurora_from_released, aurora_to_released

GOLDEN = Path(__file__).parents[2] / "golden"
OUTPUT, GRADIENT = 2e-6, 2e-5
VISION, TEXT = "visual_encoder.blocks.0.", "text_encoder.encoder.layer.0."
FROZEN = {"attn.qkv": "self_attn.qkv", "attn.proj": "self_attn.projection"} | {
    f"norm{i}": f"layer_norm{i}" for i in (1, 2)
}


def load(name):
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def section(vectors, name):
    return {k.removeprefix(name + "."): v for k, v in vectors.items() if k.startswith(name + ".")}


def released_names(tensors, where):
    """Names in a whole released checkpoint, of a module at `where` in it."""
    shared = section(tensors, "shared")
    return shared | {where + k: v for k, v in section(tensors, "mod").items()}


def is_adapter(name):
    return "CP" in name


def hugging_face(name):
    name = name.removeprefix(VISION)
    for theirs, ours in FROZEN.items():
        if name.startswith(theirs + "."):
            name = ours + name.removeprefix(theirs)
    return name


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def tuned(tiny, vectors, where, components, gqt=False):
    """One-layer BLIP with the released weights of a module at `where`, and the layer it is in."""
    base = BlipForImageTextRetrieval(tiny.blip_config(dim=64, layers=1)).eval()
    vision = where.startswith(VISION)
    layer = base.vision_model.encoder.layers[0] if vision else base.text_encoder.encoder.layer[0]
    released = released_names(section(vectors, "param"), where)
    frozen = {
        hugging_face(name.removeprefix(TEXT)): tensor
        for name, tensor in released.items()
        if not is_adapter(name)
    }
    assert not layer.load_state_dict(frozen, strict=False).unexpected_keys and frozen
    config = AuroraConfig(rank=8, components=components, gqt=gqt)
    model = get_peft_model(base, config).eval()
    weights = aurora_from_released({n: t for n, t in released.items() if is_adapter(n)}, model)
    assert not set_peft_model_state_dict(model, weights).unexpected_keys
    return model, layer


def check(model, vectors, where, inputs, output):
    """Output and gradients; every released adapter gradient is found, under released names."""
    assert relative(output, vectors["output"]) <= OUTPUT
    output.backward(vectors["grad_output"])
    for name, leaf in inputs.items():
        assert relative(leaf.grad, vectors[f"grad_input.{name}"]) <= GRADIENT, name
    gradients = {n: p.grad for n, p in model.named_parameters()}
    named = get_peft_model_state_dict(model, state_dict=gradients)
    found = aurora_to_released({n: g for n, g in named.items() if g is not None})
    expected = released_names(section(vectors, "grad"), where)
    expected = {n: g for n, g in expected.items() if is_adapter(n)}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative(found[name], gradient) <= GRADIENT, name


def leaves(vectors, *names):
    return {name: vectors[f"input.{name}"].requires_grad_() for name in names}


CASES = {
    "aurora_vit_attention": (VISION + "attn.", "self_attn", ["vit_qkv", "vit_proj"]),
    "aurora_vit_mlp": (VISION + "mlp.", "mlp", ["vit_mlp"]),
    "aurora_vit_block": (VISION, "", ["vit_qkv", "vit_proj", "vit_mlp"]),
}


@pytest.mark.parametrize("name", list(CASES))
def test_vision(tiny, name):
    where, module, components = CASES[name]
    vectors = load(name)
    model, layer = tuned(tiny, vectors, where, components)
    inputs = leaves(vectors, "x")
    output = layer.get_submodule(module)(inputs["x"])
    check(model, vectors, where, inputs, output[0] if isinstance(output, tuple) else output)


def test_self_attention(tiny):
    vectors, where = load("aurora_bert_self_attention"), TEXT + "attention.self."
    model, layer = tuned(tiny, vectors, where, ["text_self"])
    inputs = leaves(vectors, "x")
    output, _ = layer.attention.self(inputs["x"], attention_mask=vectors["input.attention_mask"])
    check(model, vectors, where, inputs, output)


def test_cross_attention(tiny):
    vectors, where = load("aurora_bert_cross_attention"), TEXT + "crossattention.self."
    model, layer = tuned(tiny, vectors, where, ["cross"])
    inputs = leaves(vectors, "x", "encoder")
    output, _ = layer.crossattention.self(
        inputs["x"],
        encoder_hidden_states=inputs["encoder"],
        encoder_attention_mask=vectors["input.encoder_attention_mask"],
    )
    check(model, vectors, where, inputs, output)


@pytest.mark.parametrize("through_stack", [False, True])
def test_multimodal_layer(tiny, through_stack):
    """Alone, and as the only layer of its stack, which hands on what layers share."""
    vectors = load("aurora_bert_layer_multimodal")
    model, layer = tuned(tiny, vectors, TEXT, ["text_self", "cross"], gqt=True)
    inputs = leaves(vectors, "x", "encoder")
    stack = model.get_base_model().text_encoder.encoder if through_stack else layer
    # The layer calls the mask of the encoder the mask of its cross-attention.
    output = stack(
        inputs["x"],
        attention_mask=vectors["input.attention_mask"],
        encoder_hidden_states=inputs["encoder"],
        encoder_attention_mask=vectors["input.encoder_attention_mask"],
    )
    check(model, vectors, TEXT, inputs, output.last_hidden_state if through_stack else output)
