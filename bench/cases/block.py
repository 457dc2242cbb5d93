"""One LLaMA decoder layer with PILL around it, whole. Shapes are B x S x d x m.

Every form has the same frozen weights. `frozen` is the Hugging Face layer alone, without adapters
(differentiated with respect to its input): the yardstick. `pill-eager` composes the released
equations (PILL, arXiv 2311.02126) with the frozen layer's SDPA attention, so that adapters alone
differ; `pill-released` materialises attention as the released code does. `mmadapt` is the PEFT
tuner on the Hugging Face layer. Variant ``fp32``: fp32 adapter weights.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention, silu, softmax

from bench import llama
from bench.case import BOTH, ELEMENT, FORWARD, Case, Provider, compiled
from bench.cases import Variant, is_image, parse_variant
from mmadapt.kernels.swiglu_adapter.reference import rms_norm

LENGTHS = (4,)
GRIDS = {"default": [(16, 512, 4096, 32)], "subset": [(16, 512, 4096, 32)]}
VARIANTS = ("pill", "pill-fp32")
DEFAULT_VARIANTS = ("pill",)
YARDSTICK, COMPILED_YARDSTICK, OURS, OURS_COMPILED = (
    "frozen", "frozen-compile", "mmadapt", "mmadapt-compile",
)  # fmt: skip
EXPERTS = ("attn", "text", "vision")
EPS = 1e-6
"""LlamaConfig's default."""


def parse(variant: str) -> Variant:
    return parse_variant(variant, ("pill",), ("fp32",))


def build(
    shape: tuple[int, int, int, int], variant: str, dtype: torch.dtype, device: torch.device
) -> Case:
    batch, length, dim, rank = shape
    options = parse(variant)
    torch.manual_seed(0)
    geometry = llama.Geometry.of_width(dim)
    model = llama.build(geometry, dtype, device)
    layer = model.layers[0]
    adapted, parameters = adapt(llama.sharing(model), rank, fp32="fp32" in options)
    frozen = weights_of(layer)
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(batch, length, dim, generator=generator, device=device).to(dtype)
    image = is_image(length, device).expand(batch, length).contiguous()
    head = dim // geometry.heads
    tables = llama.rotary(length, head, dtype, device)
    eager = released(llama.rotary(length, head, dtype, device), geometry.heads, explicit=False)
    bare, ours = call(layer, tables), call(adapted, tables, with_ids=True)
    tokens, e = batch * length, ELEMENT[dtype]
    products = 2.0 * tokens * (4 * dim**2 + 3 * dim * geometry.ffn)
    attention = 2.0 * tokens * length * dim  # causal: half of 4 T S d
    adapters = 2 * 6.0 * tokens * dim * rank
    held = sum(t.nbytes for t in (*frozen.values(), *parameters.values()))
    return Case(
        suite="block",
        label=f"{batch} x {length} x {dim}, m={rank}, {variant}",
        shape={
            "batch": batch, "length": length, "dim": dim, "rank": rank, "variant": variant,
            "tokens": tokens,
        },
        dtype=dtype,
        activations={"x": x},
        parameters=parameters,
        frozen=frozen,
        per_token={"image": image},
        eager="pill-eager",
        providers={
            YARDSTICK: Provider(bare, gated=False),
            "pill-eager": Provider(eager),
            "pill-released": Provider(released(tables, geometry.heads, explicit=True)),
            OURS: Provider(ours),
            COMPILED_YARDSTICK: Provider(compiled(bare).function, gated=False, compiled=True),
            "pill-compile": compiled(eager),
            OURS_COMPILED: compiled(ours),
        },
        exact=released(
            llama.rotary(length, head, torch.float64, device), geometry.heads, explicit=False
        ),
        moved={
            FORWARD: held + 2.0 * e * tokens * dim,
            BOTH: 2.0 * held + 4.0 * e * tokens * dim,
        },
        flops={
            FORWARD: products + attention + adapters,
            BOTH: 2 * products + 3.5 * attention + 3 * adapters,
        },
    )  # fmt: skip


def adapt(model: nn.Module, rank: int, *, fp32: bool) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model's first layer with PILL by mmadapt's tuner, and its adapters by our names."""
    from peft import get_peft_model

    from mmadapt.peft import PillConfig

    config = PillConfig(rank=rank, stage="instruct", init_weights=False)
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=fp32)
    layer = peft_model.base_model.model.layers[0]
    own = {
        "attn": layer.self_attn.mmadapt_pill_attn.default,
        "text": layer.mlp.mmadapt_pill_text.default,
        "vision": layer.mlp.mmadapt_pill_vision.default,
    }
    parameters = {
        f"{name}_{weight}": getattr(adapter, weight)
        for name, adapter in own.items()
        for weight in ("gate", "down", "up")
    }
    parameters["value_gate"] = layer.self_attn.mmadapt_pill_gate.default.gate
    temper(layer)
    layer.requires_grad_(False)  # the case says what is differentiated
    return layer, {name: p.requires_grad_() for name, p in parameters.items()}


def temper(layer: nn.Module) -> None:
    """Gates whose logits are of the order of one: the tuner's random ones saturate at this width,
    and what passes through them is then decided by rounding."""
    gate = layer.self_attn.mmadapt_pill_gate["default"].gate
    nn.init.normal_(gate, std=gate.shape[-1] ** -0.5)


def weights_of(layer: nn.Module) -> dict[str, Tensor]:
    """The frozen weights of a Hugging Face LLaMA layer by our names."""
    attention, mlp = layer.self_attn, layer.mlp
    return {
        "norm1": layer.input_layernorm.weight,
        "wq": attention.q_proj.weight,
        "wk": attention.k_proj.weight,
        "wv": attention.v_proj.weight,
        "wo": attention.o_proj.weight,
        "norm2": layer.post_attention_layernorm.weight,
        "w1": mlp.gate_proj.weight,
        "w2": mlp.down_proj.weight,
        "w3": mlp.up_proj.weight,
    }


def call(
    layer: nn.Module, tables: tuple[Tensor, Tensor], with_ids: bool = False
) -> Callable[..., Tensor]:
    """The Hugging Face layer as a function of a case's tensors; its weights are its own."""

    def run(x: Tensor, image: Tensor, **weights: Tensor) -> Tensor:
        ids = {"modality_ids": image.int()} if with_ids else {}
        y: Any = layer(x, position_embeddings=tables, **ids)
        return y[0] if isinstance(y, tuple) else y

    return run


def released(tables: tuple[Tensor, Tensor], heads: int, *, explicit: bool) -> Callable[..., Tensor]:
    """PILL's decoder block by the released equations, the second training stage."""
    cos, sin = (table.unsqueeze(1) for table in tables)

    def rotate(t: Tensor) -> Tensor:
        first, second = t.chunk(2, -1)
        return t * cos + torch.cat((-second, first), -1) * sin

    def adapter(n: Tensor, name: str, t: dict[str, Tensor]) -> Tensor:
        gate, down, up = (t[f"{name}_{w}"].to(n.dtype) for w in ("gate", "down", "up"))
        return linear(silu(linear(n, gate)) * linear(n, down), up)

    def run(x: Tensor, image: Tensor, **t: Tensor) -> Tensor:
        here = image.unsqueeze(-1)
        n = rms_norm(x, t["norm1"], EPS)
        a = n + adapter(n, "attn", t)
        q, k, v = (linear(a, t[w]).unflatten(-1, (heads, -1)) for w in ("wq", "wk", "wv"))
        gate = torch.tanh(linear(a, t["value_gate"].to(a.dtype))).unsqueeze(-1)
        v = torch.where(here.unsqueeze(-1).expand(v.shape), v * gate, v)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        q, k = rotate(q), rotate(k)
        attend = materialised if explicit else fused
        h = x + linear(attend(q, k, v).transpose(1, 2).flatten(-2), t["wo"])
        n = rms_norm(h, t["norm2"], EPS)
        routed = torch.where(here.expand(n.shape), adapter(n, "vision", t), adapter(n, "text", t))
        f = n + routed
        return h + linear(silu(linear(f, t["w1"])) * linear(f, t["w3"]), t["w2"])

    return run


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def materialised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores in memory, an added mask, softmax in fp32: the released code's attention."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    length = scores.shape[-1]
    mask = torch.full((length, length), float("-inf"), device=q.device, dtype=q.dtype).triu(1)
    return softmax((scores + mask).float(), -1).to(q.dtype) @ v
