"""SwiGLU adapter routed over two experts, norm fused: PILL's block. Shapes are T x d x m.

Variant ``input``: y = x + A_e(norm(x)); ``norm``: y = norm(x) + A_e(norm(x)); ``frozen``: the
norm's weight gets no gradient, as in PILL. Bytes as in `bench.cases.adapter`; flops count one
expert a token.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from bench.case import BOTH, ELEMENT, FORWARD, Case, Provider, compiled, copy_of, of_backend
from bench.cases import EPS, Draw, is_image
from mmadapt.kernels.swiglu_adapter import reference
from mmadapt.ops import swiglu_adapter

SHAPES = [(8192, 4096, 32), (8192, 4096, 64), (16384, 2048, 32)]
VARIANTS = ("input", "norm", "norm-frozen", "input-fp32", "norm-fp32")
DEFAULT_VARIANTS = ("input", "norm")
EXPERTS = 2


def build(
    shape: tuple[int, int, int], variant: str, dtype: torch.dtype, device: torch.device
) -> Case:
    tokens, dim, rank = shape
    residual = variant.partition("-")[0]
    draw = Draw(device, dtype, torch.float32 if "fp32" in variant else dtype)
    parameters = {
        "gate": draw.weight(EXPERTS, rank, dim),
        "down": draw.weight(EXPERTS, rank, dim),
        "up": draw.weight(EXPERTS, dim, rank),
    }
    norm = {"weight": draw.weight(dim, mean=1.0, std=0.1)}
    frozen = norm if "frozen" in variant else {}
    parameters |= {} if frozen else norm
    moved = ELEMENT[dtype] * tokens * dim
    weights = sum(p.nbytes for p in (*parameters.values(), *frozen.values()))
    flops = 6.0 * tokens * dim * rank
    return Case(
        suite="routed",
        label=f"{tokens} x {dim}, m={rank}, E={EXPERTS}, {variant}",
        shape={"tokens": tokens, "dim": dim, "rank": rank, "variant": variant},
        dtype=dtype,
        activations={"x": draw.activation(tokens, dim)},
        parameters=parameters,
        frozen=frozen,
        per_token={"expert": is_image(tokens, device).to(torch.int32)},
        eager="where",
        providers={
            "copy": copy_of("x"),
            "where": Provider(where(residual)),
            "eager-packed": Provider(eager_packed(residual)),
            "compile": compiled(where(residual)),
            "triton": of_backend("swiglu_adapter", "triton", operator(residual, "triton")),
            "reference": of_backend("swiglu_adapter", "reference", operator(residual, "reference")),
        },
        exact=exact(residual),
        moved={FORWARD: 2.0 * moved + weights, BOTH: 6.0 * moved + 3.0 * weights},
        flops={FORWARD: flops, BOTH: 3 * flops},
    )


def where(residual: str) -> Callable[..., Tensor]:
    """The authors' form: both experts for all tokens, then a choice by a [T, d] mask."""

    def run(
        x: Tensor, gate: Tensor, down: Tensor, up: Tensor, weight: Tensor, expert: Tensor
    ) -> Tensor:
        gate, down, up = (w.to(x.dtype) for w in (gate, down, up))
        n = reference.rms_norm(x, weight.to(x.dtype), EPS)
        text, image = (
            linear(silu(linear(n, gate[e])) * linear(n, down[e]), up[e]) for e in range(EXPERTS)
        )
        mask = (expert == 1).unsqueeze(-1).expand(x.shape)
        return (x if residual == "input" else n) + torch.where(mask, image, text)

    return run


def eager_packed(residual: str) -> Callable[..., Tensor]:
    """All experts in one product each way; hidden units of the other expert are zeroed between."""

    def run(
        x: Tensor, gate: Tensor, down: Tensor, up: Tensor, weight: Tensor, expert: Tensor
    ) -> Tensor:
        gate, down, up = (w.to(x.dtype) for w in (gate, down, up))
        rank = gate.shape[1]
        n = rms_norm(x, x.shape[-1:], weight.to(x.dtype), EPS)
        pre_gate, pre_down = linear(n, torch.cat((gate.flatten(0, 1), down.flatten(0, 1)))).chunk(
            2, -1
        )
        ids = torch.arange(EXPERTS, device=x.device).repeat_interleave(rank)
        hidden = silu(pre_gate) * pre_down * (expert.unsqueeze(-1) == ids)
        base = x if residual == "input" else n
        return torch.addmm(base, hidden, up.transpose(1, 2).flatten(0, 1))

    return run


def operator(residual: str, backend: str) -> Callable[..., Tensor]:
    def run(
        x: Tensor, gate: Tensor, down: Tensor, up: Tensor, weight: Tensor, expert: Tensor
    ) -> Tensor:
        return swiglu_adapter(
            x, gate, down, up, expert=expert, norm=(weight, EPS), residual=residual, backend=backend
        )

    return run


def exact(residual: str) -> Callable[..., Tensor]:
    def run(
        x: Tensor, gate: Tensor, down: Tensor, up: Tensor, weight: Tensor, expert: Tensor
    ) -> Tensor:
        return reference.swiglu_adapter(
            x, gate, down, up, expert=expert, norm=(weight, EPS), residual=residual
        )

    return run
