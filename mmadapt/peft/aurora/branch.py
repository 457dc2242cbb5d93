"""How an adapted linear layer runs: as one operator, or as its base plus the update."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmadapt import ops
from mmadapt.peft._dtypes import usable
from mmadapt.peft.aurora.layouts import tall_factor, wide_factor

if TYPE_CHECKING:
    from mmadapt.peft.aurora.linear import AuroraLinear


def operands(layer: "AuroraLinear", adapter: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    """``factor_in [R, d]``, ``factor_out [d, R]`` and the modes of the layer's chunks."""
    factors = layer.shared.factors[adapter]
    return (
        factors.factor_in(layer.factor_widths[0]).to(layer.device),
        factors.factor_out(layer.factor_widths[1]).to(layer.device),
        layer.modes(adapter),
    )


def operation(
    layers: Sequence["AuroraLinear"], x: Tensor, adapter: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the `cp_linear_group` that computes base and update of one adapter.

    Args:
        layers: one layer, or several square ones with the same input, factors and settings.
    """
    first = layers[0]
    factor_in, factor_out, modes = operands(first, adapter)
    kind, base, dropout = first.site.kind, first.base_layer, first.active_dropout(adapter)
    weights, biases = [base.weight], [base.bias]
    if kind == "linear":
        weights = [layer.base_layer.weight for layer in layers]
        biases = [layer.base_layer.bias for layer in layers]
        modes = [layer.modes(adapter)[0] for layer in layers]
    elif kind != "down" and dropout > 0.0:  # every chunk has a mask of its own
        weights = list(base.weight.chunk(first.site.chunks))
        biases = None if base.bias is None else list(base.bias.chunk(first.site.chunks))
    elif kind == "down":
        factor_in, modes = wide_factor(factor_in, modes), [torch.ones_like(factor_in[:, 0])]
    else:
        factor_out, modes = tall_factor(factor_out, modes), [torch.ones_like(factor_in[:, 0])]
    settings = {
        "scale": first.scale(adapter),
        "dropout": dropout,
        "dropout_at": first.site.dropout_at,
    }
    factors = (usable(factor_in, x.dtype), usable(factor_out, x.dtype))
    return (x, weights, biases, *factors, [usable(mode, x.dtype) for mode in modes]), settings


def fused(layer: "AuroraLinear", x: Tensor, adapter: str) -> Tensor:
    """Base and update of one adapter as one operator."""
    args, settings = operation([layer], x, adapter)
    ys = ops.cp_linear_group(*args, **settings)
    return ys[0] if len(ys) == 1 else torch.cat(ys, dim=-1)


def fused_group(layers: Sequence["AuroraLinear"], x: Tensor, adapter: str) -> tuple[Tensor, ...]:
    """The same for several square layers with the same input, factors and settings."""
    args, settings = operation(layers, x, adapter)
    return ops.cp_linear_group(*args, **settings)


def add_update(
    layer: "AuroraLinear", y: Tensor, x: Tensor, adapter: str, z: Tensor | None = None
) -> Tensor:
    """``y`` plus the update of one adapter in plain torch.

    Args:
        y: output of the base layer, or of the base layer with other adapters.
        z: ``x factor_in^T`` where that is known already.
    """
    factor_in, factor_out, modes = operands(layer, adapter)
    scale, p = layer.scale(adapter), layer.active_dropout(adapter)
    kind, before = layer.site.kind, layer.site.dropout_at == "before"
    if kind == "down":
        core = F.dropout(F.linear(x, wide_factor(factor_in, modes).to(x.dtype)), p, p > 0)
        return _accumulate(y, core, factor_out, scale)
    z = F.linear(x, factor_in.to(x.dtype)) if z is None else z
    if kind == "linear" or p > 0:
        cores = []
        for mode in modes:
            core = F.dropout(z, p, p > 0) if before else z
            core = core * mode.to(z.dtype) if mode.ndim == 1 else core @ mode.to(z.dtype)
            cores.append(core if before else F.dropout(core, p, p > 0))
        if kind == "linear":
            return _accumulate(y, cores[0], factor_out, scale)
        parts = y.chunk(layer.site.chunks, dim=-1)
        parts = [
            _accumulate(part, core, factor_out, scale)
            for part, core in zip(parts, cores, strict=True)
        ]
        return torch.cat(parts, dim=-1)
    return _accumulate(y, z, tall_factor(factor_out, modes), scale)


def delta_weight(layer: "AuroraLinear", adapter: str) -> Tensor:
    """The update as a matrix of the base weight's shape, in the dtype of the factors."""
    factor_in, factor_out, modes = operands(layer, adapter)
    if layer.site.kind == "down":
        return layer.scale(adapter) * factor_out @ wide_factor(factor_in, modes)
    return layer.scale(adapter) * tall_factor(factor_out, modes) @ factor_in


def _accumulate(y: Tensor, core: Tensor, factor: Tensor, scale: float) -> Tensor:
    factor = factor.to(core.dtype)
    flat = torch.addmm(
        y.reshape(-1, y.shape[-1]).to(core.dtype), core.flatten(0, -2), factor.t(), alpha=scale
    )
    return flat.view(y.shape).to(y.dtype)
