"""The value gate: values of image tokens times tanh(logits), head by head. Shapes are T x H x h.

Variants: ``static`` (one logit a head), ``projected`` (logits = hidden weight^T, hidden [T, H h]).
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

from bench.case import BOTH, ELEMENT, FORWARD, Case, Provider, compiled, copy_of, of_backend
from bench.cases import IMAGE_TOKENS, TEXT_LENGTH, Draw, is_image
from mmadapt.kernels.modality_gate import reference
from mmadapt.ops import modality_gate, projected_modality_gate

SHAPES = [(8192, 32, 128)]
VARIANTS = ("static", "projected", "static-fp32", "projected-fp32")
DEFAULT_VARIANTS = ("static", "projected")


def build(
    shape: tuple[int, int, int], variant: str, dtype: torch.dtype, device: torch.device
) -> Case:
    tokens, heads, width = shape
    dim = heads * width
    projected = "projected" in variant
    draw = Draw(device, dtype, torch.float32 if "fp32" in variant else dtype)
    activations = {"value": draw.activation(tokens, heads, width)}
    image = tokens * IMAGE_TOKENS / TEXT_LENGTH
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
        label=f"{tokens} x {heads} x {width}, {variant}, 1/16 image",
        shape={"tokens": tokens, "heads": heads, "width": width, "variant": variant},
        dtype=dtype,
        activations=activations,
        parameters=parameters,
        per_token={"mask": is_image(tokens, device)},
        eager="where",
        providers={
            "copy": copy_of("value"),
            "where": Provider(formula),
            "compile": compiled(formula),
            "triton": of_backend(contract, "triton", operator(projected, "triton")),
            "triton-inplace": inplace(contract, projected, "triton"),
            "cuda": of_backend(contract, "cuda", operator(projected, "cuda")),
            "cuda-inplace": inplace(contract, projected, "cuda"),
            "reference": of_backend(contract, "reference", operator(projected, "reference")),
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


def inplace(contract: str, projected: bool, backend: str) -> Provider:
    run = operator(projected, backend, inplace=True)
    if "inplace" not in inspect.signature(modality_gate).parameters:
        return Provider(run, skip="the operator has no in-place form")
    reason = of_backend(contract, backend, run).skip
    return Provider(
        lambda value, **rest: run(_NotALeaf.apply(value), **rest),
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
