"""The value gate: values of image tokens times tanh(logits), head by head. Shapes are T x H x h.

Variants: ``static`` (one logit a head), ``projected`` (logits = hidden weight^T, hidden [T, H h]);
``fp32`` weights, ``image<percent>`` of the tokens in runs of ``run<length>``.
Minimal bytes of an operator that returns a new tensor: value in, y out, dy in, dvalue out, for the
projected one dense dhidden out, and hidden of the image tokens read twice. `triton-inplace` and
`cuda-inplace` overwrite value, as between v_proj and attention: no copy in forward.
"""

import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.case import (
    BOTH,
    ELEMENT,
    FORWARD,
    Case,
    Provider,
    compiled_both,
    copy_of,
    of_backend,
    registered,
)
from bench.cases import Draw, Variant, image_of, parse_variant
from mmadapt.kernels.modality_gate import reference
from mmadapt.ops import backends, modality_gate, projected_modality_gate

LENGTHS = (3,)
GRIDS = {
    "default": [(8192, 32, 128)],
    "subset": [(8192, 32, 128)],
    "tokens": [(t, 32, 128) for t in (512, 2048, 8192, 16384, 65536)],
    "full": [(t, h, w) for t in (512, 8192, 65536) for h in (16, 32) for w in (64, 128)],
}
VARIANTS = (
    "static", "projected", "static-fp32", "projected-fp32", "static-image50-run8",
    "projected-image100",
)  # fmt: skip
DEFAULT_VARIANTS = ("static", "projected")
INPLACE = "-inplace"


def parse(variant: str) -> Variant:
    return parse_variant(variant, ("static", "projected"), ("fp32",), ("image", "run"))


def build(
    shape: tuple[int, int, int], variant: str, dtype: torch.dtype, device: torch.device
) -> Case:
    tokens, heads, width = shape
    dim = heads * width
    options = parse(variant)
    projected = options.kind == "projected"
    draw = Draw(device, dtype, torch.float32 if "fp32" in options else dtype)
    activations = {"value": draw.activation(tokens, heads, width)}
    mask = image_of(options, tokens, device)
    image = float(mask.sum())
    values = ELEMENT[dtype] * tokens * dim
    forward, both = 2.0 * values, 4.0 * values
    if projected:
        activations["hidden"] = draw.activation(tokens, dim)
        parameters = {"weight": draw.weight(heads, dim)}
        hidden = ELEMENT[dtype] * image * dim
        forward, both = forward + hidden, both + 2 * hidden + values
    else:
        parameters = {"logits": draw.weight(heads, std=1.0)}
    flops = 2.0 * image * dim * heads if projected else image * dim
    contract = "projected_modality_gate" if projected else "modality_gate"
    formula = where_projected if projected else where_static
    return Case(
        suite="gate",
        label=f"{tokens} x {heads} x {width}, {variant}"
        + ("" if "image" in options.numbers else ", 1/16 image"),
        shape={"tokens": tokens, "heads": heads, "width": width, "variant": variant},
        dtype=dtype,
        activations=activations,
        parameters=parameters,
        per_token={"mask": mask},
        eager="where",
        providers={
            "copy": copy_of("value"),
            "where": Provider(formula),
            **compiled_both(formula),
            **registered(contract, lambda name: operator(projected, name), device),
            **{
                f"{name}{INPLACE}": inplace(contract, projected, name, device)
                for name in backends(contract)
                if name != "reference"
            },
        },
        exact=reference.projected_modality_gate if projected else reference.modality_gate,
        moved={FORWARD: forward, BOTH: both},
        flops={FORWARD: flops, BOTH: 3 * flops},
    )


def where_static(value: Tensor, logits: Tensor, mask: Tensor) -> Tensor:
    gated = value * torch.tanh(logits.to(value.dtype)).unsqueeze(-1)
    return torch.where(mask[:, None, None].expand(value.shape), gated, value)


def where_projected(value: Tensor, hidden: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """The authors' form: the gate of every token, then a choice by a [T, H, h] mask."""
    gate = torch.tanh(linear(hidden, weight.to(hidden.dtype)))
    return torch.where(mask[:, None, None].expand(value.shape), value * gate.unsqueeze(-1), value)


def operator(projected: bool, backend: str, **options: bool) -> Callable[..., Tensor]:
    op = projected_modality_gate if projected else modality_gate
    return functools.partial(op, backend=backend, **options)


def inplace(
    contract: str, projected: bool, backend: str, device: torch.device | None = None
) -> Provider:
    run = operator(projected, backend, inplace=True)
    if "inplace" not in inspect.signature(modality_gate).parameters:
        return Provider(run, skip="the operator has no in-place form")
    reason = of_backend(contract, backend, run, device).skip
    return Provider(
        lambda value, **rest: run(_NotALeaf.apply(value), **rest),
        kinds=(FORWARD, BOTH),  # a backward cannot run twice after its input is gone
        skip=reason,
        overwrites=("value",),
    )


class _NotALeaf(torch.autograd.Function):
    """The same memory as a projection would return it: neither a leaf nor a view."""

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        return value.new_empty(0).set_(value.detach())

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        return dy
