"""FLOP formulas against the counts of the same products written out in torch."""

import itertools
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmadapt.kernels.cp_linear import reference as cp_reference
from mmadapt.kernels.swiglu_adapter import reference as swiglu_reference
from mmadapt.ops import cp_linear, projected_modality_gate, swiglu_adapter

TOKENS, DIM, RANK, OUT = 6, 8, 3, 5


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)))
def test_swiglu_adapter(needs):
    shapes = ((TOKENS, DIM), (1, RANK, DIM), (1, RANK, DIM), (1, DIM, RANK))
    inputs = [torch.randn(s, requires_grad=n) for s, n in zip(shapes, needs, strict=True)]

    def run(function):
        y = function(*inputs)
        if any(needs):
            y.sum().backward()

    assert flops(lambda: run(swiglu_adapter)) == flops(lambda: run(swiglu_reference.swiglu_adapter))


@pytest.mark.parametrize("mode_shape", [(RANK,), (RANK, RANK)])
@pytest.mark.parametrize("trainable", ["all", "none", "x", "factor_out"])
def test_cp_linear(mode_shape, trainable):
    shapes = {
        "x": (TOKENS, DIM),
        "factor_in": (RANK, DIM),
        "factor_out": (OUT, RANK),
        "mode": mode_shape,
    }
    inputs = {n: torch.randn(s, requires_grad=trainable in ("all", n)) for n, s in shapes.items()}
    weight = torch.randn(OUT, DIM)

    def run(function):
        y = function(weight=weight, bias=None, **inputs)
        if y.requires_grad:
            y.sum().backward()

    expected = flops(lambda: run(cp_reference.cp_linear))
    if trainable == "factor_out":  # recomputes z M instead of saving it
        expected += 2 * TOKENS * RANK * RANK * (len(mode_shape) == 2)
    if trainable == "all":
        expected += 2 * TOKENS * RANK * RANK * (len(mode_shape) == 2)
    assert flops(lambda: run(cp_linear)) == expected


def test_projected_modality_gate():
    hidden, weight = torch.randn(TOKENS, DIM), torch.randn(2, DIM, requires_grad=True)
    value, mask = torch.randn(TOKENS, 2, 4), torch.ones(TOKENS, dtype=torch.bool)
    count = flops(lambda: projected_modality_gate(value, hidden, weight, mask).sum().backward())
    assert count == 2 * (2 * TOKENS * DIM * 2)


@pytest.mark.parametrize("first", ["mmadapt.ops", "torch.utils.flop_counter"])
def test_formulas_are_registered_whatever_is_imported_first(first):
    second = {"mmadapt.ops": "torch.utils.flop_counter"}.get(first, "mmadapt.ops")
    code = (
        f"import {first}, {second}, torch\n"
        "from torch.utils.flop_counter import flop_registry\n"
        "assert torch.ops.mmadapt.swiglu_adapter_fwd in flop_registry\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
