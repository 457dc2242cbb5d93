"""CP-factor linear: y_k = x W_k^T + ((x A^T) M_k) B^T, W frozen. T x d x R or T x d_in x d_out x R.

Variants: ``single``, and ``group`` of three weights on one x (q, k, v; ``n7``: of seven). Modes are
diagonal, ``core``: R x R, as in Aurora's released code. `frozen-gemm` is the products with W alone:
what the unadapted layer costs. Minimal bytes: x, y and W in forward; dy, dx, W and x again in
backward; factors are small.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.case import BOTH, ELEMENT, FORWARD, Case, Provider, compiled_both, copy_of, registered
from bench.cases import Draw, Variant, parse_variant
from bench.peers import manual, peft
from bench.peers.manual import apply_mode
from mmadapt.kernels.cp_linear import reference
from mmadapt.ops import cp_linear_group

RANKS = (8, 16, 32, 64, 128)
LENGTHS = (3, 4)
GRIDS = {
    "default": [(8192, 4096, 64), (16384, 768, 64)],
    "subset": [(8192, 4096, 64), (16384, 768, 64)],
    "tokens": [(t, 4096, 64) for t in (512, 2048, 8192, 16384, 65536)],
    "full": [
        (8192, d_in, d_out, r)
        for d_in, d_out in ((1152, 1152), (4096, 4096), (4096, 14336), (14336, 4096))
        for r in RANKS
    ],
}
VARIANTS = ("single", "group", "single-fp32", "group-fp32", "single-core", "group-core", "group-n7")
"""fp32: fp32 factors and modes; W keeps the activations' dtype."""
DEFAULT_VARIANTS = ("single", "group")
SCALE = 0.5


def parse(variant: str) -> Variant:
    return parse_variant(variant, ("single", "group"), ("fp32", "core"), ("n",))


def build(shape: tuple[int, ...], variant: str, dtype: torch.dtype, device: torch.device) -> Case:
    tokens, d_in, d_out, rank = shape if len(shape) == 4 else (*shape[:2], *shape[1:])
    options = parse(variant)
    count = options.get("n", 3) if options.kind == "group" else 1
    draw = Draw(device, dtype, torch.float32 if "fp32" in options else dtype)
    parameters = {"factor_in": draw.weight(rank, d_in), "factor_out": draw.weight(d_out, rank)}
    for k in range(count):
        size = (rank, rank) if "core" in options else (rank,)
        parameters[f"mode{k}"] = draw.weight(*size, std=rank**-0.5 if "core" in options else 1.0)
    frozen = {f"weight{k}": draw.weight(d_out, d_in).to(dtype) for k in range(count)}
    e = ELEMENT[dtype]
    forward = float(e * (tokens * (d_in + count * d_out) + count * d_in * d_out))
    gemms = 2.0 * tokens * d_in * d_out * count
    low = 2.0 * tokens * rank * (d_in + count * d_out)
    size = f"{d_in}" if d_in == d_out else f"{d_in} x {d_out}"
    return Case(
        suite="cp_linear",
        label=f"{tokens} x {size}, R={rank}, {variant}",
        shape={"tokens": tokens, "dim": d_in, "out": d_out, "rank": rank, "variant": variant},
        dtype=dtype,
        activations={"x": draw.activation(tokens, d_in)},
        parameters=parameters,
        frozen=frozen,
        providers={
            "copy": copy_of("x"),
            "frozen-gemm": Provider(frozen_gemm, gated=False),
            "eager": Provider(eager),
            "peft-style": Provider(peft_style),
            "peft-lora": peft.lora(list(frozen.values()), rank, SCALE),
            "gemm-addmm": Provider(gemm_addmm),
            "manual": Provider(by_hand),
            **compiled_both(eager),
            **registered("cp_linear", operator, device),
        },
        exact=exact,
        moved={FORWARD: forward, BOTH: 2 * forward + e * tokens * d_in},
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
        linear(x, weight) + linear(apply_mode(linear(x, a), (SCALE * mode).to(x.dtype)), b)
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
        update = linear(apply_mode(linear(x, a), mode.to(x.dtype)), b)
        results.append(result + update * SCALE)
    return tuple(results)


def gemm_addmm(
    x: Tensor, factor_in: Tensor, factor_out: Tensor, **tensors: Tensor
) -> tuple[Tensor, ...]:
    """x A^T once for all weights; each product with W gets the update added in place."""
    z, b = linear(x, factor_in.to(x.dtype)), factor_out.to(x.dtype).t()
    return tuple(
        linear(x, weight).addmm_(apply_mode(z, (SCALE * mode).to(x.dtype)), b)
        for weight, mode in _members(tensors)
    )


def by_hand(
    x: Tensor, factor_in: Tensor, factor_out: Tensor, **tensors: Tensor
) -> tuple[Tensor, ...]:
    """One autograd node for all weights, backward written by hand."""
    weights, modes = zip(*_members(tensors), strict=True)
    modes = [(SCALE * mode).to(x.dtype) for mode in modes]
    a, b = factor_in.to(x.dtype), factor_out.to(x.dtype)
    return manual.LowRankGroup.apply(x, a, b, len(weights), *weights, *modes)


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
