"""CP-factor linear: y_k = x W_k^T + ((x A^T) * g_k) B^T, W frozen, modes diagonal. T x d x R.

Variants: ``single``, and ``group`` of three weights on one x (q, k, v). `frozen-gemm` is the
products with W alone: what the unadapted layer costs. Minimal bytes: x, y and W in forward; dy, dx,
W and x again in backward; factors are small.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.case import BOTH, ELEMENT, FORWARD, Case, Provider, compiled, copy_of, of_backend
from bench.cases import Draw
from mmadapt.kernels.cp_linear import reference
from mmadapt.ops import cp_linear_group

SHAPES = [(8192, 4096, 64), (16384, 768, 64)]
VARIANTS = ("single", "group", "single-fp32", "group-fp32")
"""fp32: fp32 factors and modes; W keeps the activations' dtype."""
DEFAULT_VARIANTS = ("single", "group")
SCALE = 0.5


def build(
    shape: tuple[int, int, int], variant: str, dtype: torch.dtype, device: torch.device
) -> Case:
    tokens, dim, rank = shape
    count = 3 if "group" in variant else 1
    draw = Draw(device, dtype, torch.float32 if "fp32" in variant else dtype)
    parameters = {"factor_in": draw.weight(rank, dim), "factor_out": draw.weight(dim, rank)}
    parameters |= {f"mode{k}": draw.weight(rank, std=1.0) for k in range(count)}
    frozen = {f"weight{k}": draw.weight(dim, dim).to(dtype) for k in range(count)}
    e = ELEMENT[dtype]
    forward = float(e * (tokens * dim * (1 + count) + count * dim * dim))
    gemms = 2.0 * tokens * dim * dim * count
    low = 2.0 * tokens * dim * rank * (1 + count)
    return Case(
        suite="cp_linear",
        label=f"{tokens} x {dim}, R={rank}, {variant}",
        shape={"tokens": tokens, "dim": dim, "rank": rank, "variant": variant},
        dtype=dtype,
        activations={"x": draw.activation(tokens, dim)},
        parameters=parameters,
        frozen=frozen,
        providers={
            "copy": copy_of("x"),
            "frozen-gemm": Provider(frozen_gemm, gated=False),
            "eager": Provider(eager),
            "peft-style": Provider(peft_style),
            "gemm-addmm": Provider(gemm_addmm),
            "compile": compiled(eager),
            "triton": of_backend("cp_linear", "triton", operator("triton")),
            "reference": of_backend("cp_linear", "reference", operator("reference")),
        },
        exact=exact,
        moved={FORWARD: forward, BOTH: 2 * forward + e * tokens * dim},
        flops={FORWARD: gemms + low, BOTH: 2 * gemms + 3 * low},
    )


def _members(tensors: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Pairs of frozen weight and mode."""
    count = sum(name.startswith("mode") for name in tensors)
    return [(tensors[f"weight{k}"], tensors[f"mode{k}"]) for k in range(count)]


def frozen_gemm(x: Tensor, **tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(linear(x, weight) for weight, _ in _members(tensors))


def eager(
    x: Tensor, factor_in: Tensor, factor_out: Tensor, **tensors: Tensor
) -> tuple[Tensor, ...]:
    """The LoRA form, each weight on its own; scale folded into the mode."""
    a, b = factor_in.to(x.dtype), factor_out.to(x.dtype)
    return tuple(
        linear(x, weight) + linear(linear(x, a) * (SCALE * mode).to(x.dtype), b)
        for weight, mode in _members(tensors)
    )


def peft_style(
    x: Tensor, factor_in: Tensor, factor_out: Tensor, **tensors: Tensor
) -> tuple[Tensor, ...]:
    """The sequence of PEFT's LoRA layer: base result, then + B(g * A(x)) * scaling at width d."""
    a, b = factor_in.to(x.dtype), factor_out.to(x.dtype)
    results = []
    for weight, mode in _members(tensors):
        result = linear(x, weight)
        results.append(result + linear(linear(x, a) * mode.to(x.dtype), b) * SCALE)
    return tuple(results)


def gemm_addmm(
    x: Tensor, factor_in: Tensor, factor_out: Tensor, **tensors: Tensor
) -> tuple[Tensor, ...]:
    """x A^T once for all weights; each product with W gets the update added in place."""
    z, b = linear(x, factor_in.to(x.dtype)), factor_out.to(x.dtype).t()
    return tuple(
        linear(x, weight).addmm_(z * (SCALE * mode).to(x.dtype), b)
        for weight, mode in _members(tensors)
    )


def operator(backend: str) -> Callable[..., tuple[Tensor, ...]]:
    def run(
        x: Tensor, factor_in: Tensor, factor_out: Tensor, **tensors: Tensor
    ) -> tuple[Tensor, ...]:
        weights, modes = zip(*_members(tensors), strict=True)
        return cp_linear_group(
            x, weights, None, factor_in, factor_out, modes, scale=SCALE, backend=backend
        )

    return run


def exact(
    x: Tensor, factor_in: Tensor, factor_out: Tensor, **tensors: Tensor
) -> tuple[Tensor, ...]:
    return tuple(
        reference.cp_linear(x, weight, None, factor_in, factor_out, mode, scale=SCALE)
        for weight, mode in _members(tensors)
    )
