"""One BLIP ViT layer with Aurora's mode approximation on its six linears. Shapes are B x N x d x R.

Every form has the same frozen weights and the attention of the Hugging Face layer, which keeps its
scores in memory. `frozen` is that layer alone. `aurora-eager` composes the released equations
(Aurora, arXiv 2305.08381): factors U and V shared, a dense core contracted with one mode vector a
weight, and the FFN's four chunks of width d with interleaved modes; x U once a weight. `mmadapt` is
the PEFT tuner on the Hugging Face layer (it contracts modes once a step, so its forward alone does
not pay for that), `mmadapt-ops` (and `mmadapt-compile`) the same layer by
`mmadapt.ops.cp_linear_group` and `cp_linear`. No dropout.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear, softmax

from bench import llama
from bench.case import BOTH, ELEMENT, FORWARD, Case, Provider, compiled
from bench.cases import Draw, Variant, parse_variant
from mmadapt.ops import cp_linear, cp_linear_group

LENGTHS = (4,)
GRIDS = {"default": [(32, 577, 768, 64)], "subset": [(32, 577, 768, 64)]}
VARIANTS = ("aurora", "aurora-fp32")
DEFAULT_VARIANTS = ("aurora",)
CHUNKS = 4
"""The FFN is four times as wide as the stream."""
MODES = {"modes_qkv": (3, 4), "modes_proj": (1, 4), "modes_fc1": (4, 8), "modes_fc2": (4, 8)}
"""Mode vectors of each linear, and how many were drawn together, which their size depends on."""


def parse(variant: str) -> Variant:
    return parse_variant(variant, ("aurora",), ("fp32",))


def build(
    shape: tuple[int, int, int, int], variant: str, dtype: torch.dtype, device: torch.device
) -> Case:
    batch, length, dim, rank = shape
    options = parse(variant)
    model, heads, eps = frozen_model(dim, dtype, device)
    layer = model.encoder.layers[0]
    frozen = weights_of(layer)
    draw = Draw(device, dtype, torch.float32 if "fp32" in options else dtype)
    parameters = {
        "factor_in": draw.weight(rank, dim),
        "factor_out": draw.weight(dim, rank, std=rank**-0.5),
        "core": draw.weight(rank, rank, rank, std=1.0 / rank),
    }
    for name, (count, fan) in MODES.items():
        parameters[name] = draw.weight(count, rank, std=(2 / (rank + fan)) ** 0.5)
    parameters = {name: nn.Parameter(tensor) for name, tensor in parameters.items()}
    bare = call(layer)
    tokens, e = batch * length, ELEMENT[dtype]
    products = 2.0 * tokens * 12 * dim**2
    attention = 4.0 * tokens * length * dim
    low = 2.0 * tokens * rank * dim * (1 + 3 + 2 + 1 + CHUNKS + CHUNKS + 1)
    held = sum(t.nbytes for t in frozen.values())
    return Case(
        suite="vit_block",
        label=f"{batch} x {length} x {dim}, R={rank}, {variant}",
        shape={
            "batch": batch, "length": length, "dim": dim, "rank": rank, "variant": variant,
            "tokens": tokens,
        },
        dtype=dtype,
        activations={"x": draw.activation(batch, length, dim)},
        parameters=parameters,
        frozen=frozen,
        eager="aurora-eager",
        providers={
            "frozen": Provider(bare, gated=False),
            "aurora-eager": Provider(adapted(heads, eps, eager_linears)),
            "mmadapt": tuner(model, parameters, rank),
            "mmadapt-ops": Provider(adapted(heads, eps, fused_linears)),
            "frozen-compile": Provider(compiled(bare).function, gated=False, compiled=True),
            "aurora-compile": compiled(adapted(heads, eps, eager_linears)),
            "mmadapt-compile": compiled(adapted(heads, eps, fused_linears)),
        },
        exact=adapted(heads, eps, eager_linears),
        moved={
            FORWARD: held + 2.0 * e * tokens * dim,
            BOTH: 2.0 * held + 4.0 * e * tokens * dim,
        },
        flops={
            FORWARD: products + attention + low,
            BOTH: 2 * products + 3 * attention + 3 * low,
        },
    )  # fmt: skip


def frozen_model(
    dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[nn.Module, int, float]:
    """A random BLIP vision model of one layer, its heads, and the epsilon of its LayerNorms."""
    from transformers import BlipVisionConfig, BlipVisionModel

    torch.manual_seed(0)
    heads = dim // 64 if dim % 64 == 0 else 2
    config = BlipVisionConfig(
        hidden_size=dim,
        intermediate_size=CHUNKS * dim,
        num_attention_heads=heads,
        num_hidden_layers=1,
        image_size=32,
    )
    with torch.device(device):
        model = BlipVisionModel(config)
    return model.to(dtype).eval().requires_grad_(False), heads, config.layer_norm_eps


def tuner(model: nn.Module, parameters: dict[str, nn.Parameter], rank: int) -> Provider:
    """mmadapt's Aurora tuner on the model's layer, with the case's own parameters in it."""
    try:
        from peft import get_peft_model

        from mmadapt.peft import AuroraConfig
    except ImportError as error:
        return Provider(call(model), skip=str(error).partition(" (")[0])
    config = AuroraConfig(rank=rank, core="dense", mlp_layout="released", branch_dropout=0.0)
    fp32 = parameters["core"].dtype == torch.float32
    tuned = get_peft_model(llama.sharing(model), config, autocast_adapter_dtype=fp32).base_model
    layer = tuned.model.encoder.layers[0]
    sites = {
        "modes_qkv": layer.self_attn.qkv,
        "modes_proj": layer.self_attn.projection,
        "modes_fc1": layer.mlp.fc1,
        "modes_fc2": layer.mlp.fc2,
    }
    for name, site in sites.items():
        site.mmadapt_aurora_mode["default"] = parameters[name]
    factors = tuned.mmadapt_aurora_factors["default"]
    for name, _ in list(factors.named_parameters()):  # factor_in_<width> and so on
        setattr(factors, name, parameters[name.rstrip("_0123456789")])
    return Provider(call(layer))


def weights_of(layer: nn.Module) -> dict[str, Tensor]:
    parts = {
        "norm1": layer.layer_norm1,
        "qkv": layer.self_attn.qkv,
        "proj": layer.self_attn.projection,
        "norm2": layer.layer_norm2,
        "fc1": layer.mlp.fc1,
        "fc2": layer.mlp.fc2,
    }
    return {
        f"{n}_{kind}": getattr(m, kind) for n, m in parts.items() for kind in ("weight", "bias")
    }


def call(layer: nn.Module) -> Callable[..., Tensor]:
    def run(x: Tensor, **weights: Tensor) -> Tensor:
        y = layer(x)
        return y[0] if isinstance(y, tuple) else y

    return run


def adapted(
    heads: int, eps: float, linears: Callable[..., tuple[Callable[..., Tensor], ...]]
) -> Callable[..., Tensor]:
    """The layer, its linears given by `linears(tensors)`: qkv, projection, fc1, fc2."""

    def run(x: Tensor, **t: Tensor) -> Tensor:
        qkv, projection, fc1, fc2 = linears(t)
        width = x.shape[-1:]
        n = layer_norm(x, width, t["norm1_weight"], t["norm1_bias"], eps)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv(n))
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        h = x + projection((softmax(scores, -1) @ v).transpose(1, 2).flatten(-2))
        n = layer_norm(h, width, t["norm2_weight"], t["norm2_bias"], eps)
        return h + fc2(gelu(fc1(n)))

    return run


def contracted(t: dict[str, Tensor], dtype: torch.dtype) -> tuple[list[Tensor], ...]:
    """Modes [R, R] of q, k, v and projection, of fc1's chunks and of fc2's."""
    attention = torch.einsum("abr,jr->jab", t["core"], torch.cat((t["modes_qkv"], t["modes_proj"])))
    rank = t["core"].shape[0]

    def chunks(modes: Tensor) -> list[Tensor]:
        # The released code flattens (core column, mode) together and cuts that into chunks.
        mixed = torch.einsum("abr,jr->abj", t["core"], modes)
        return list(mixed.reshape(rank, CHUNKS * rank).to(dtype).split(rank, -1))

    return list(attention.to(dtype)), chunks(t["modes_fc1"]), chunks(t["modes_fc2"])


def eager_linears(t: dict[str, Tensor]) -> tuple[Callable[..., Tensor], ...]:
    dtype = t["qkv_weight"].dtype
    attention, first, second = contracted(t, dtype)
    u, v = t["factor_in"].to(dtype), t["factor_out"].to(dtype)

    def update(x: Tensor, mode: Tensor) -> Tensor:
        return linear(linear(x, u) @ mode, v)

    def qkv(x: Tensor) -> tuple[Tensor, ...]:
        low = torch.cat([update(x, mode) for mode in attention[:3]], -1)
        return (linear(x, t["qkv_weight"], t["qkv_bias"]) + low).chunk(3, -1)

    def projection(x: Tensor) -> Tensor:
        return linear(x, t["proj_weight"], t["proj_bias"]) + update(x, attention[3])

    def fc1(x: Tensor) -> Tensor:
        low = torch.cat([update(x, mode) for mode in first], -1)
        return linear(x, t["fc1_weight"], t["fc1_bias"]) + low

    def fc2(h: Tensor) -> Tensor:
        chunks = h.chunk(CHUNKS, -1)
        low = sum(linear(c, u) @ mode.t() for c, mode in zip(chunks, second, strict=True))
        return linear(h, t["fc2_weight"], t["fc2_bias"]) + linear(low, v)

    return qkv, projection, fc1, fc2


def fused_linears(t: dict[str, Tensor]) -> tuple[Callable[..., Tensor], ...]:
    """The same by mmadapt's operators. fc2's chunks fold into one wide factor, mode one."""
    attention, first, second = contracted(t, t["factor_in"].dtype)
    u, v = t["factor_in"], t["factor_out"]
    wide = torch.cat([mode @ u for mode in second], -1)
    ones = torch.ones_like(u[:, 0])

    def group(x: Tensor, name: str, modes: list[Tensor]) -> tuple[Tensor, ...]:
        weights = t[f"{name}_weight"].chunk(len(modes))
        biases = t[f"{name}_bias"].chunk(len(modes))
        return cp_linear_group(x, weights, biases, u, v, modes)

    def qkv(x: Tensor) -> tuple[Tensor, ...]:
        return group(x, "qkv", attention[:3])

    def projection(x: Tensor) -> Tensor:
        return cp_linear(x, t["proj_weight"], t["proj_bias"], u, v, attention[3])

    def fc1(x: Tensor) -> Tensor:
        return torch.cat(group(x, "fc1", first), -1)

    def fc2(h: Tensor) -> Tensor:
        return cp_linear(h, t["fc2_weight"], t["fc2_bias"], wide, v, ones)

    return qkv, projection, fc1, fc2
