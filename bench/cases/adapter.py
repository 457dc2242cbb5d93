"""SwiGLU adapter, one expert: y = x + A(n), n = x or rms_norm(x). Shapes are T x d x m.

Minimal bytes: forward reads x and writes y; forward and backward together six times T d (x, y, dy,
dx, and x and dy again for the weight gradients); weights and their gradients once a pass.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from bench.case import BOTH, ELEMENT, FORWARD, Case, Provider, compiled_both, copy_of, registered
from bench.cases import EPS, Draw, Variant, parse_variant
from bench.peers import liger, manual
from mmadapt.kernels.swiglu_adapter import reference
from mmadapt.ops import swiglu_adapter

DIMS, RANKS = (1024, 1152, 2048, 4096, 5120, 8192), (16, 32, 64, 128, 256)
TOKENS = (512, 2048, 8192, 16384, 65536)
LENGTHS = (3,)
GRIDS = {
    "default": [
        (8192, 4096, 32),
        (8192, 4096, 64),
        (8192, 4096, 128),
        (32768, 4096, 64),
        (16384, 768, 64),
        (16384, 2048, 32),
        (2048, 4096, 32),
    ],
    "subset": [(512, 4096, 32), (2048, 4096, 32), (8192, 4096, 32), (65536, 4096, 32)],
    "tokens": [(t, 4096, 32) for t in TOKENS],
    "heat": [(8192, d, m) for d, m in itertools.product(DIMS, RANKS)],
    "full": [(t, d, m) for d, m, t in itertools.product(DIMS, RANKS, TOKENS)],
}
VARIANTS = ("plain", "norm", "plain-fp32", "norm-fp32")
"""norm: rms_norm first, residual input. fp32: master weights, cast by the eager forms."""
DEFAULT_VARIANTS = ("plain", "norm")


def parse(variant: str) -> Variant:
    return parse_variant(variant, ("plain", "norm"), ("fp32",))


def build(
    shape: tuple[int, int, int], variant: str, dtype: torch.dtype, device: torch.device
) -> Case:
    tokens, dim, rank = shape
    options = parse(variant)
    draw = Draw(device, dtype, torch.float32 if "fp32" in options else dtype)
    parameters = {
        "gate": draw.weight(rank, dim),
        "down": draw.weight(rank, dim),
        "up": draw.weight(dim, rank),
    }
    if options.kind == "norm":
        parameters["weight"] = draw.weight(dim, mean=1.0, std=0.1)
    packed = torch.cat((parameters["gate"], parameters["down"])).to(dtype)
    moved = ELEMENT[dtype] * tokens * dim
    weights = sum(p.nbytes for p in parameters.values())
    flops = 6.0 * tokens * dim * rank
    return Case(
        suite="adapter",
        label=f"{tokens} x {dim}, m={rank}, {variant}",
        shape={"tokens": tokens, "dim": dim, "rank": rank, "variant": variant},
        dtype=dtype,
        activations={"x": draw.activation(tokens, dim)},
        parameters=parameters,
        providers={
            "copy": copy_of("x"),
            "eager": Provider(eager),
            "eager-packed": Provider(eager_packed(packed)),
            "manual": Provider(by_hand),
            "liger": liger.adapter(device),
            **compiled_both(eager),
            **registered("swiglu_adapter", operator, device),
        },
        exact=exact,
        moved={FORWARD: 2.0 * moved + weights, BOTH: 6.0 * moved + 3.0 * weights},
        flops={FORWARD: flops, BOTH: 3 * flops},
    )


def eager(
    x: Tensor, gate: Tensor, down: Tensor, up: Tensor, weight: Tensor | None = None
) -> Tensor:
    """What a user writes; the norm as in LLaMA."""
    gate, down, up = (w.to(x.dtype) for w in (gate, down, up))
    n = x if weight is None else reference.rms_norm(x, weight.to(x.dtype), EPS)
    return x + linear(silu(linear(n, gate)) * linear(n, down), up)


def eager_packed(packed: Tensor) -> Callable[..., Tensor]:
    """One product for both pre-activations, silu * mul, the sum inside the last product; torch's
    fused rms_norm. Without autograd the weights are packed beforehand."""

    def run(
        x: Tensor, gate: Tensor, down: Tensor, up: Tensor, weight: Tensor | None = None
    ) -> Tensor:
        both = torch.cat((gate, down)).to(x.dtype) if torch.is_grad_enabled() else packed
        n = x if weight is None else rms_norm(x, x.shape[-1:], weight.to(x.dtype), EPS)
        pre_gate, pre_down = linear(n, both).chunk(2, -1)
        return torch.addmm(x, silu(pre_gate) * pre_down, up.to(x.dtype).t())

    return run


def by_hand(
    x: Tensor, gate: Tensor, down: Tensor, up: Tensor, weight: Tensor | None = None
) -> Tensor:
    """Hand-written backward; torch's fused rms_norm in front."""
    gate, down, up = (w.to(x.dtype) for w in (gate, down, up))
    if weight is None:
        return manual.SwiGLU.apply(x, None, gate, down, up)
    n = rms_norm(x, x.shape[-1:], weight.to(x.dtype), EPS)
    return manual.SwiGLU.apply(n, x, gate, down, up)


def operator(backend: str) -> Callable[..., Tensor]:
    def run(
        x: Tensor, gate: Tensor, down: Tensor, up: Tensor, weight: Tensor | None = None
    ) -> Tensor:
        norm = None if weight is None else (weight, EPS)
        return swiglu_adapter(x, gate, down, up, norm=norm, backend=backend)

    return run


def exact(
    x: Tensor, gate: Tensor, down: Tensor, up: Tensor, weight: Tensor | None = None
) -> Tensor:
    norm = None if weight is None else (weight, EPS)
    return reference.swiglu_adapter(x, gate[None], down[None], up[None], norm=norm)
