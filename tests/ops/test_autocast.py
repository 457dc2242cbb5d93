"""Autocast: activations in the autocast dtype, fp32 parameters and gradients as they are."""

import pytest
import torch

from mmadapt.ops import cp_linear, modality_gate, projected_modality_gate, swiglu_adapter

DIM, RANK, HEADS, TOKENS = 8, 3, 2, 6
MASK = torch.tensor([True, False] * 3)

CASES = {
    "swiglu_adapter": (
        lambda x, gate, down, up, norm: swiglu_adapter(x, gate, down, up, norm=(norm, 1e-5)),
        ((RANK, DIM), (RANK, DIM), (DIM, RANK), (DIM,)),
    ),
    "cp_linear": (
        lambda x, u, v, p, bias: cp_linear(x, torch.eye(DIM, dtype=u.dtype), bias, u, v, p),
        ((RANK, DIM), (DIM, RANK), (RANK,), (DIM,)),
    ),
    "modality_gate": (lambda x, logits: modality_gate(x, logits, MASK), ((HEADS,),)),
    "projected_modality_gate": (
        lambda x, weight: projected_modality_gate(x, x.detach(), weight, MASK),
        ((HEADS, DIM),),
    ),
}


@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_autocast_equals_a_cast_input(case, x_dtype, backward_inside):
    function, shapes = CASES[case]
    x = torch.randn(TOKENS, DIM).to(x_dtype).requires_grad_()
    weights = [torch.randn(s).requires_grad_() for s in shapes]
    dy = torch.randn(TOKENS, DIM).bfloat16()

    expected = function(x.bfloat16(), *weights)
    expected_grads = torch.autograd.grad(expected, [x, *weights], dy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = function(x, *weights)
        if backward_inside:
            grads = torch.autograd.grad(y, [x, *weights], dy)
    if not backward_inside:
        grads = torch.autograd.grad(y, [x, *weights], dy)

    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    for grad, same, tensor in zip(grads, expected_grads, [x, *weights], strict=True):
        assert grad.dtype == tensor.dtype
        assert torch.equal(grad, same)


@pytest.mark.parametrize("case", CASES)
def test_autocast_reconciles_16_bit_parameters(case):
    function, shapes = CASES[case]
    x = torch.randn(TOKENS, DIM)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = function(x, *(torch.randn(s).half() for s in shapes))
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("case", CASES)
def test_autocast_leaves_fp64_alone(case):
    function, shapes = CASES[case]
    tensors = [torch.randn(s, dtype=torch.float64) for s in ((TOKENS, DIM), *shapes)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = function(*tensors)
    assert y.dtype == torch.float64
