"""modality_gate and projected_modality_gate against their formulas."""

import itertools

import pytest
import torch

from mmadapt.kernels.modality_gate import reference
from mmadapt.ops import modality_gate, projected_modality_gate

pytestmark = pytest.mark.usefixtures("poison_new_buffers")

HEADS, SIZE, WIDTH = 3, 4, 10
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]


def static(tokens=11, dtype=torch.float64, parameter_dtype=None):
    value = torch.randn(tokens, HEADS, SIZE, dtype=torch.float64).to(dtype)
    return [value, torch.randn(HEADS).to(parameter_dtype or dtype)]


def token(tokens=11, dtype=torch.float64, parameter_dtype=None):
    value, _ = static(tokens, dtype)
    return [value, torch.randn(tokens, HEADS).to(parameter_dtype or dtype)]


def projected(tokens=11, dtype=torch.float64, parameter_dtype=None):
    value, _ = static(tokens, dtype)
    hidden = torch.randn(tokens, WIDTH).to(dtype)
    return [value, hidden, torch.randn(HEADS, WIDTH).to(parameter_dtype or dtype)]


CASES = [
    pytest.param(static, modality_gate, reference.modality_gate, id="static"),
    pytest.param(token, modality_gate, reference.modality_gate, id="token"),
    pytest.param(
        projected, projected_modality_gate, reference.projected_modality_gate, id="projected"
    ),
]
all_cases = pytest.mark.parametrize(("make", "op", "formula"), CASES)


def leaves(tensors):
    return [t.detach().requires_grad_() for t in tensors]


@all_cases
def test_fp64_equals_the_formula(make, op, formula):
    tensors, mask = leaves(make()), torch.rand(11) < 0.5
    dy = torch.randn(11, HEADS, SIZE, dtype=torch.float64)
    ours, theirs = op(*tensors, mask), formula(*tensors, mask)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(ours, tensors, dy),
        torch.autograd.grad(theirs, tensors, dy),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@all_cases
def test_gradcheck(make, op, formula):
    mask = torch.tensor([True, False, True])
    tensors = [t.double().requires_grad_() for t in make(tokens=3)]
    assert torch.autograd.gradcheck(lambda *tensors: op(*tensors, mask), tensors)


@all_cases
@pytest.mark.parametrize("tokens", [0, 1, 199])
@pytest.mark.parametrize(("dtype", "parameter_dtype"), DTYPES)
def test_error_rule(assert_as_good_as_eager, make, op, formula, tokens, dtype, parameter_dtype):
    draws = [
        _draw(make, op, formula, tokens, dtype, parameter_dtype)
        for _ in range(32 if tokens == 1 else 1)
    ]
    for triples in zip(*draws, strict=True):
        pooled = (torch.stack(t) for t in zip(*triples, strict=True))
        assert_as_good_as_eager(*pooled, largest=tokens > 1)


def _draw(make, op, formula, tokens, dtype, parameter_dtype):
    """(ours, eager, exact) for the output and every gradient."""
    tensors = leaves(make(tokens, dtype, parameter_dtype))
    mask = torch.rand(tokens) < 0.7
    dy = torch.randn(tokens, HEADS, SIZE).to(dtype)

    def run(function, inputs, leaves, dy):
        y = function(*inputs, mask)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    wide = [t.detach().double().requires_grad_() for t in tensors]
    cast = [t if t.dtype == dtype else t.to(dtype) for t in tensors]
    ours = run(op, tensors, tensors, dy)
    assert [t.dtype for t in ours[1:]] == [t.dtype for t in tensors]
    eager, exact = run(formula, cast, tensors, dy), run(formula, wide, wide, dy.double())
    return list(zip(ours, eager, exact, strict=True))


@all_cases
def test_unmasked_rows_pass_bitwise_and_zero_logits_erase(make, op, formula):
    value, *rest = make(dtype=torch.float32)
    mask = torch.rand(11) < 0.5
    gated = op(value, *rest, mask)
    assert torch.equal(gated[~mask], value[~mask])
    assert not torch.equal(gated[mask], value[mask])
    rest[-1].zero_()
    erased = op(value, *rest, mask)
    assert torch.equal(erased[~mask], value[~mask])
    assert (erased[mask] == 0).all()


@all_cases
def test_a_batch_without_the_modality_gives_zero_gradients(make, op, formula):
    tensors = leaves(make(dtype=torch.float32))
    y = op(*tensors, torch.zeros(11, dtype=torch.bool))
    assert torch.equal(y, tensors[0]) and y.data_ptr() != tensors[0].data_ptr()
    dvalue, *others = torch.autograd.grad(y, tensors, torch.ones_like(y))
    assert torch.equal(dvalue, torch.ones_like(y))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in others)


@all_cases
def test_every_subset_of_frozen_operands(make, op, formula):
    tensors, mask = make(), torch.rand(11) < 0.5
    dy = torch.randn(11, HEADS, SIZE, dtype=torch.float64)
    full_leaves = leaves(tensors)
    full = torch.autograd.grad(op(*full_leaves, mask), full_leaves, dy)
    for needs in itertools.product([False, True], repeat=len(tensors)):
        partial = [t.detach().requires_grad_(n) for t, n in zip(tensors, needs, strict=True)]
        y = op(*partial, mask)
        assert y.requires_grad == any(needs)
        if any(needs):
            y.backward(dy)
        for tensor, needed, expected in zip(partial, needs, full, strict=True):
            assert (tensor.grad is not None) == needed
            if needed:
                torch.testing.assert_close(tensor.grad, expected)


def test_unmasked_tokens_never_reach_the_projection():
    value, hidden, weight = leaves(projected(dtype=torch.float32))
    mask = torch.tensor([True, False] * 5 + [True])
    dirty = torch.where(mask[:, None], hidden, float("nan")).detach().requires_grad_()
    results = []
    for states in (hidden, dirty):
        y = projected_modality_gate(value, states, weight, mask)
        results.append([y, *torch.autograd.grad(y, (value, states, weight), torch.ones_like(y))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@all_cases
def test_strides_and_layouts(make, op, formula):
    tensors, mask = make(tokens=12), torch.rand(12) < 0.5
    expected = op(*tensors, mask)
    value, *rest = tensors
    per_token = [t.view(3, 4, -1) if t.shape[0] == 12 else t for t in rest]
    split = op(value.view(3, 4, HEADS, SIZE), *per_token, mask.view(3, 4))
    flat = op(value.view(3, 4, HEADS * SIZE), *per_token, mask.view(3, 4))
    assert torch.equal(split.view_as(expected), expected) and split.is_contiguous()
    assert torch.equal(flat.view_as(expected), expected) and flat.shape == (3, 4, HEADS * SIZE)
    permuted = value.permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_()
    y = op(permuted, *rest, mask)
    assert torch.equal(y, expected) and y.is_contiguous()
    (dvalue,) = torch.autograd.grad(y.sum(), permuted)
    (dense,) = torch.autograd.grad(
        op(permuted, *rest, mask), permuted, torch.ones_like(expected).contiguous()
    )
    assert torch.equal(dvalue, dense)


@all_cases
def test_a_single_token_without_leading_dimensions(make, op, formula):
    tensors = make(tokens=1)
    rows = [t[0] if t.shape[0] == 1 else t for t in tensors]
    y = op(*rows, torch.tensor(True))
    torch.testing.assert_close(y, op(*tensors, torch.tensor([True]))[0])
