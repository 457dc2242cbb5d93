"""torch.compile: one graph, a changing number of tokens, one recompilation (the dynamic one)."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from mmadapt.ops import (
    cp_linear_group,
    modality_gate,
    projected_modality_gate,
    swiglu_adapter,
)

DIM, RANK, HEADS = 8, 3, 2


def parameters(*shapes):
    return [torch.randn(s).requires_grad_() for s in shapes]


def swiglu_case():
    weights = parameters((DIM,), (2, RANK, DIM), (2, RANK, DIM), (2, DIM, RANK))

    def function(x, kind):
        norm, gate, down, up = weights
        y = swiglu_adapter(2 * x, gate, down, up, expert=kind, norm=(norm, 1e-5), residual="norm")
        return y.sin()

    return function, weights


def cp_case():
    weights = parameters((RANK, DIM), (DIM, RANK), (RANK,), (RANK, RANK), (DIM,))
    frozen = [torch.randn(DIM, DIM), torch.randn(DIM, DIM)]

    def function(x, kind):
        factor_in, factor_out, diagonal, dense, bias = weights
        a, b = cp_linear_group(
            2 * x, frozen, [None, bias], factor_in, factor_out, [diagonal, dense]
        )
        return (a * b).sin()

    return function, weights


def gate_case():
    weights = parameters((HEADS,))

    def function(x, kind):
        return modality_gate(2 * x, weights[0], kind > 0).sin()

    return function, weights


def projected_case():
    weights = parameters((HEADS, DIM))

    def function(x, kind):
        return projected_modality_gate(2 * x, x, weights[0], kind > 0).sin()

    return function, weights


CASES = {
    "swiglu_adapter": swiglu_case,
    "cp_linear_group": cp_case,
    "modality_gate": gate_case,
    "projected_modality_gate": projected_case,
}


def check(case, backend, sizes):
    torch._dynamo.reset()
    function, weights = CASES[case]()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for tokens in sizes:
        x = torch.randn(2, tokens, DIM, requires_grad=True)
        kind = torch.randint(0, 2, (2, tokens))
        dy = torch.randn(2, tokens, DIM)
        expected, actual = function(x, kind), compiled(x, kind)
        torch.testing.assert_close(actual, expected)
        leaves = [x, *weights]
        for a, b in zip(
            torch.autograd.grad(actual, leaves, dy),
            torch.autograd.grad(expected, leaves, dy),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("case", CASES)
def test_fullgraph_with_a_changing_number_of_tokens(case):
    check(case, "aot_eager", (5, 7, 12, 31))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_inductor(case):
    check(case, "inductor", (5, 7, 12))


def test_dropout_under_compile_draws_new_masks():
    torch._dynamo.reset()
    factor_in, factor_out, mode = parameters((RANK, DIM), (DIM, RANK), (RANK,))
    weight, x = torch.randn(DIM, DIM), torch.randn(64, DIM)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(x):
        (y,) = cp_linear_group(x, [weight], None, factor_in, factor_out, [mode], dropout=0.5)
        return y

    assert not torch.equal(function(x), function(x))


def test_export():
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            shapes = ((2, RANK, DIM), (2, RANK, DIM), (2, DIM, RANK))
            self.weights = torch.nn.ParameterList(parameters(*shapes))

        def forward(self, x, kind):
            return swiglu_adapter(x, *self.weights, expert=kind)

    module, tokens = Module(), torch.export.Dim("tokens", min=2, max=64)
    inputs = torch.randn(6, DIM), torch.randint(-1, 2, (6,))
    program = torch.export.export(
        module, inputs, dynamic_shapes={"x": {0: tokens}, "kind": {0: tokens}}
    )
    inputs = torch.randn(9, DIM), torch.randint(-1, 2, (9,))
    torch.testing.assert_close(program.module()(*inputs), module(*inputs))
