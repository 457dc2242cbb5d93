"""The closed-form toy of the PILL specification: exact losses, logits and gradient norms."""

from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model, set_peft_model_state_dict
from transformers import Blip2Config, Blip2ForConditionalGeneration, LlamaConfig
from transformers.models.llama import modeling_llama

from mmadapt.peft import PillConfig, convert_meta_llama, from_released, set_stage, to_released

DIM, HEADS, LAYERS, VOCAB, HIDDEN, RANK, QFORMER = 64, 4, 3, 101, 176, 8, 24
PLACEHOLDER = 1  # never drawn by the formula for ids, which starts at 3


def u(shape, k):
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (torch.remainder(31 * n * n + 17 * n + 101 * k + 7, 257) / 128 - 1).view(shape)


def layer_shapes():
    """Names and shapes of one layer, in the order that numbers them."""

    def adapter(name):
        return {
            f"{name}.down_sampler": (RANK, DIM),
            f"{name}.down_sampler_gate": (RANK, DIM),
            f"{name}.up_sampler": (DIM, RANK),
        }

    return (
        adapter("adapter_attn")
        | {"attention.vis_adapter_gate": (HEADS, DIM)}
        | {f"attention.{w}": (DIM, DIM) for w in ("wk", "wo", "wq", "wv")}
        | {"attention_norm": (DIM,)}
        | {
            "feed_forward.w1": (HIDDEN, DIM),
            "feed_forward.w2": (DIM, HIDDEN),
            "feed_forward.w3": (HIDDEN, DIM),
        }
        | {"ffn_norm": (DIM,)}
        | adapter("txt_adapter_ffn")
        | adapter("vis_adapter_ffn")
    )


def released_weights():
    shapes = {
        f"layers.{i}.{name}": (shape, 19 * i + k)
        for i in range(LAYERS)
        for k, (name, shape) in enumerate(layer_shapes().items())
    }
    shapes |= {
        "norm": ((DIM,), 57),
        "output": ((VOCAB, DIM), 58),
        "tok_embeddings": ((VOCAB, DIM), 59),
        "vis_adapter_proj": ((DIM, QFORMER), 60),
    }
    weights = {}
    for name, (shape, k) in shapes.items():
        value = u(shape, k)
        if len(shape) == 1:
            value = 1 + 0.1 * value
        elif name != "tok_embeddings":
            value = 1.5 / shape[1] ** 0.5 * value
        weights[f"{name}.weight"] = value
    return weights


def toy_batch():
    token = torch.arange(96).view(2, 48)
    ids = (7 * token + 3) % 98 + 3
    labels = ids.clone()
    ids[1, 44:] = 0
    labels[0, :40], labels[1, :20], labels[1, 44:] = 0, 0, 0
    assert (labels[:, 1:] != 0).sum() == 32
    ids[0, 5:37] = PLACEHOLDER
    return {"input_ids": ids, "labels": labels.masked_fill(labels == 0, -100)}


class ExactNorm(torch.nn.Module):
    """RMSNorm in the dtype of its input; Hugging Face's drops to fp32 inside."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class ExactRotary(torch.nn.Module):
    """Rotary angles in fp64; Hugging Face computes cosines and sines in fp32."""

    def forward(self, x, position_ids):
        size = DIM // HEADS
        frequencies = 10000 ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
        angles = (position_ids[..., None] * frequencies).repeat(1, 1, 2)
        return angles.cos(), angles.sin()


def exact(model):
    """fp64 inside norms and rotary embedding too, which only a test ever needs."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, modeling_llama.LlamaRMSNorm):
                setattr(module, name, ExactNorm(child))
            elif isinstance(child, modeling_llama.LlamaRotaryEmbedding):
                setattr(module, name, ExactRotary())


def toy(dtype, stage, monkeypatch, zeroed=False):
    weights = released_weights()
    if zeroed:
        for name in weights:
            if "up_sampler" in name or "vis_adapter_gate" in name:
                weights[name] = torch.zeros_like(weights[name])
    base = Blip2ForConditionalGeneration(
        Blip2Config(
            vision_config={"hidden_size": 8, "num_hidden_layers": 0, "image_size": 14},
            qformer_config={"hidden_size": QFORMER, "num_hidden_layers": 0, "vocab_size": 1},
            text_config=LlamaConfig(
                vocab_size=VOCAB,
                hidden_size=DIM,
                intermediate_size=HIDDEN,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                rms_norm_eps=1e-5,
            ).to_dict(),
            num_query_tokens=32,
            image_token_id=PLACEHOLDER,
        )
    ).to(dtype)
    base.language_model.load_state_dict(convert_meta_llama(weights, HEADS))
    model = get_peft_model(
        base, PillConfig(rank=RANK, projector="linear"), autocast_adapter_dtype=False
    )
    set_peft_model_state_dict(model, from_released(weights, model))
    if dtype == torch.float64:
        exact(base)
        # Hugging Face computes the loss from logits cast to fp32.
        monkeypatch.setattr(base, "loss_function", exact_loss)
    features = u((2, 32, QFORMER), 777).to(dtype)

    def image_features(pixel_values, **kwargs):
        projected = base.language_projection(features)
        return SimpleNamespace(pooler_output=projected, qformer_outputs=None, vision_outputs=None)

    monkeypatch.setattr(base, "get_image_features", image_features)
    set_stage(model, stage)
    return model.train()


def exact_loss(logits, labels, vocab_size, **kwargs):
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, vocab_size), labels[:, 1:].reshape(-1), ignore_index=-100
    )


def run(model):
    output = model(pixel_values=torch.zeros(2, 3, 14, 14), **toy_batch())
    output.loss.backward()
    grads = {
        n.replace(".default", ""): p.grad for n, p in model.named_parameters() if p.requires_grad
    }
    released = to_released({n: g for n, g in grads.items() if g is not None})
    return output, released


STATES = {  # (stage, up projections and gates zeroed): loss, sum |logits|, logits, gradient norms
    ("instruct", False): (
        5.266977385064,
        6526.675458035,
        {
            (1, 20): (0.746212992, 0.272904744, 1.153128370),
            (0, 45): (-0.350355211, -1.601516504, 0.405240653),
        },
        {
            "vis_adapter_proj": 2.589043985e-1,
            "layers.0.attention.vis_adapter_gate": 1.845350259e-1,
            "layers.1.attention.vis_adapter_gate": 1.686723369e-1,
            "layers.2.attention.vis_adapter_gate": 1.450434515e-1,
            "layers.0.vis_adapter_ffn.up_sampler": 3.509553312e-2,
            "layers.1.vis_adapter_ffn.up_sampler": 1.009273272e-2,
            "layers.2.vis_adapter_ffn.up_sampler": 0,
            "layers.0.txt_adapter_ffn.down_sampler_gate": 5.318767721e-1,
            "layers.2.adapter_attn.down_sampler": 1.883505872e-1,
        },
    ),
    ("align", False): (
        5.296546528390,
        6496.524749412,
        {
            (1, 20): (0.409631654, 0.120575066, 0.742769513),
            (0, 45): (-0.041846650, -1.462009813, 0.495727486),
        },
        {
            "vis_adapter_proj": 2.925064980e-1,
            "layers.0.vis_adapter_ffn.up_sampler": 3.243367573e-2,
            "layers.1.vis_adapter_ffn.up_sampler": 1.317860718e-2,
            "layers.2.vis_adapter_ffn.up_sampler": 1.372979422e-1,
        },
    ),
    ("instruct", True): (
        5.108427423877,
        None,
        {},
        {
            "layers.0.attention.vis_adapter_gate": 3.198281538e-1,
            "layers.1.attention.vis_adapter_gate": 1.838102662e-1,
            "layers.2.attention.vis_adapter_gate": 1.003156486e-1,
            "vis_adapter_proj": 1.562950603e-2,
            "layers.2.vis_adapter_ffn.up_sampler": 0,
        },
    ),
    ("align", True): (5.109909997819, None, {}, {}),
}


@pytest.mark.parametrize(
    "dtype, loss_error, error", [(torch.float64, 1e-10, 1e-9), (torch.float32, 2e-6, 2e-5)]
)
@pytest.mark.parametrize("stage, zeroed", list(STATES))
def test_toy(dtype, loss_error, error, stage, zeroed, monkeypatch):
    loss, total, logits, norms = STATES[stage, zeroed]
    output, grads = run(toy(dtype, stage, monkeypatch, zeroed))
    assert abs(output.loss.item() - loss) <= loss_error
    if total is not None:
        assert abs(output.logits.abs().sum().item() / total - 1) <= error
    for (row, position), values in logits.items():
        found = output.logits[row, position, :3].double()
        assert (found - torch.tensor(values, dtype=torch.float64)).abs().max() <= max(error, 1e-9)
    for name, norm in norms.items():
        found = grads[f"{name}.weight"].norm().item()
        assert found == 0 if norm == 0 else abs(found / norm - 1) <= error, name
    if zeroed and stage == "instruct":
        assert not any(grads[n].any() for n in grads if ".down_sampler" in n)
    if stage == "align":
        assert not any("gate.weight" in n and "down" not in n for n in grads)
