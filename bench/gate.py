"""The correctness gate: no time for a wrong result.

Rule: the error against fp64 is at most twice the error of eager torch in the same dtype on the same
tensors plus one rounding unit, for every output and every gradient, in root mean square and, where
a tensor has enough entries for its largest error not to be luck, at its worst entry.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.case import BOTH, Case, as_tuple

ENOUGH_FOR_MAXIMUM = 256
CHUNK_ELEMENTS = 2**24
"""Rows of activations widened to fp64 at a time: about 128 MB a tensor."""


class GateError(AssertionError):
    """A provider's result is outside the rule."""


@dataclass(frozen=True)
class Error:
    rms: float
    largest: float


def exact_results(case: Case) -> list[Tensor]:
    """Outputs, activation gradients and parameter gradients in fp64, a chunk of rows at a time."""
    width = max(t[0].numel() for t in case.activations.values()) if case.tokens else 1
    step = max(1, CHUNK_ELEMENTS // max(width, 1))
    parameters = {n: t.detach().double().requires_grad_() for n, t in case.parameters.items()}
    frozen = {n: t.double() for n, t in case.frozen.items()}
    sums = [torch.zeros_like(t) for t in parameters.values()]
    ys: list[list[Tensor]] = []
    grads: list[list[Tensor]] = []
    for start in range(0, case.tokens, step):
        rows = slice(start, start + step)
        local = {n: t[rows].detach().double().requires_grad_() for n, t in case.activations.items()}
        tokens = {n: t[rows] for n, t in case.per_token.items()}
        y = as_tuple(case.exact(**local, **parameters, **tokens, **frozen))
        inputs = [*local.values(), *parameters.values()]
        g = torch.autograd.grad(y, inputs, [dy[rows].double() for dy in case.dys[0]])
        ys.append([t.detach() for t in y])
        grads.append(list(g[: len(local)]))
        for total, part in zip(sums, g[len(local) :], strict=True):
            total += part
    return [
        *(torch.cat(parts) for parts in zip(*ys, strict=True)),
        *(torch.cat(parts) for parts in zip(*grads, strict=True)),
        *sums,
    ]


def error(result: Tensor, exact: Tensor) -> Error:
    """Of one tensor against fp64, relative to the exact tensor's RMS and largest entry."""
    off = (result.double() - exact).abs_()
    rms = exact.square().mean().sqrt().clamp_min(1e-300)
    return Error(
        float(off.square().mean().sqrt() / rms),
        float(off.max() / exact.abs().max().clamp_min(1e-300)),
    )


class Gate:
    """Holds a case's fp64 results and eager's errors; `check` measures a provider by them."""

    def __init__(self, case: Case):
        self.case = case
        self.exact = exact_results(case)
        results = case.make(case.eager, BOTH)(0)
        self.names = case.result_names(BOTH)
        self.units = {n: torch.finfo(r.dtype).eps for n, r in zip(self.names, results, strict=True)}
        self.eager = {
            n: error(r, e) for n, r, e in zip(self.names, results, self.exact, strict=True)
        }

    def check(self, results: list[Tensor | None], kind: str) -> dict[str, float]:
        """Relative RMS error of every result; raises GateError outside the rule."""
        found: dict[str, float] = {}
        names = self.case.result_names(kind)
        if len(results) != len(names):
            raise GateError(f"returned {len(results)} tensors, expected {len(names)}: {names}")
        exacts = dict(zip(self.names, self.exact, strict=True))
        for name, result in zip(names, results, strict=True):
            exact = exacts[name]
            if result is None:
                raise GateError(f"{name} is None")
            if result.shape != exact.shape:
                raise GateError(f"{name} has shape {list(result.shape)}, not {list(exact.shape)}")
            if not torch.isfinite(result).all():
                raise GateError(f"{name} is not finite")
            ours, theirs, unit = error(result, exact), self.eager[name], self.units[name]
            found[name] = ours.rms
            if ours.rms > 2 * theirs.rms + unit:
                raise GateError(f"{name}: error {ours.rms:.2e}, eager's is {theirs.rms:.2e}")
            if exact.numel() >= ENOUGH_FOR_MAXIMUM and ours.largest > 2 * theirs.largest + unit:
                raise GateError(
                    f"{name}: largest error {ours.largest:.2e}, eager's is {theirs.largest:.2e}"
                )
        return found
