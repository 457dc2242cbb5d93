"""cp_linear against its formula: values, gradients, dropout, groups, freezing."""

import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from mmadapt.kernels.cp_linear import reference
from mmadapt.ops import cp_linear, cp_linear_group

pytestmark = pytest.mark.usefixtures("poison_new_buffers")

DIM_IN, DIM_OUT, RANK = 12, 9, 4


def operands(tokens=11, dense=False, dtype=torch.float64, parameter_dtype=None):
    """``x, weight, bias, factor_in, factor_out, mode``; all but the weight require gradients."""
    mode = (RANK, RANK) if dense else (RANK,)
    shapes = [(DIM_OUT, DIM_IN), (DIM_OUT,), (RANK, DIM_IN), (DIM_OUT, RANK), mode]
    x = torch.randn(tokens, DIM_IN, dtype=torch.float64).to(dtype)
    rest = [(torch.randn(s) / s[-1] ** 0.5).to(parameter_dtype or dtype) for s in shapes]
    tensors = [x, *rest]
    return [t.requires_grad_(k != 1) for k, t in enumerate(tensors)]


def trainable(tensors):
    return [t for t in tensors if t.requires_grad]


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dropout_at", ["after", "before"])
def test_fp64_equals_the_formula(dense, dropout, dropout_at):
    tensors = operands(dense=dense)
    settings = {"scale": 0.7, "dropout": dropout, "dropout_at": dropout_at}
    torch.manual_seed(5)
    ours = cp_linear(*tensors, **settings)
    torch.manual_seed(5)
    seed = torch.randint(2**62, (1,))[0]
    keep = reference.keep_mask(seed, 11, RANK, dropout) if dropout else None
    theirs = reference.cp_linear(*tensors, keep=keep, **settings)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, trainable(tensors), dy),
        torch.autograd.grad(theirs, trainable(tensors), dy),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dense", [False, True])
def test_gradcheck(dense):
    x, weight, *rest = operands(tokens=3, dense=dense)

    def function(x, *rest):
        torch.manual_seed(7)
        return cp_linear(x, weight, *rest, scale=0.7, dropout=0.3)

    assert torch.autograd.gradcheck(function, (x, *rest))


def test_core_of_a_superdiagonal_is_the_diagonal():
    x, weight, bias, factor_in, factor_out, mode = operands()
    diagonal = cp_linear(x, weight, bias, factor_in, factor_out, mode)
    dense = cp_linear(x, weight, bias, factor_in, factor_out, torch.diag(mode))
    torch.testing.assert_close(diagonal, dense, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tokens", [0, 1, 199])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    ("dtype", "parameter_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
    ],
)
def test_error_rule(assert_as_good_as_eager, tokens, dense, dtype, parameter_dtype):
    draws = [_draw(tokens, dense, dtype, parameter_dtype) for _ in range(32 if tokens == 1 else 1)]
    for triples in zip(*draws, strict=True):
        pooled = (torch.stack(t) for t in zip(*triples, strict=True))
        assert_as_good_as_eager(*pooled, largest=tokens > 1)


def _draw(tokens, dense, dtype, parameter_dtype):
    """(ours, eager, exact) for the output and every gradient."""
    tensors = operands(tokens, dense, dtype, parameter_dtype)
    dy = torch.randn(tokens, DIM_OUT).to(dtype)

    def run(function, inputs, leaves, dy):
        y = function(*inputs, scale=0.7)
        return [y, *torch.autograd.grad(y, trainable(leaves), dy)]

    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    cast = [t if t.dtype == dtype else t.to(dtype) for t in tensors]
    ours = run(cp_linear, tensors, tensors, dy)
    eager = run(reference.cp_linear, cast, tensors, dy)
    exact = run(reference.cp_linear, wide, wide, dy.double())
    assert [t.dtype for t in ours[1:]] == [t.dtype for t in trainable(tensors)]
    return list(zip(ours, eager, exact, strict=True))


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=5)))
def test_every_subset_of_frozen_operands(needs):
    tensors = operands(dense=True)
    y = cp_linear(*tensors)
    dy = torch.randn_like(y)
    full = torch.autograd.grad(y, trainable(tensors), dy)
    x, weight, *rest = tensors
    partial = [t.detach().requires_grad_(n) for t, n in zip((x, *rest), needs, strict=True)]
    y = cp_linear(partial[0], weight, *partial[1:])
    assert y.requires_grad == any(needs)
    if not any(needs):
        return
    y.backward(dy)
    for tensor, needed, expected in zip(partial, needs, full, strict=True):
        if needed:
            torch.testing.assert_close(tensor.grad, expected)
        else:
            assert tensor.grad is None


def test_a_trainable_weight_is_an_error():
    tensors = operands()
    tensors[1].requires_grad_()
    with pytest.raises(ValueError, match=r"weights\[0\].requires_grad is True.*frozen"):
        cp_linear(*tensors)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_group_equals_its_members(dropout):
    x, weight, bias, factor_in, factor_out, mode = operands()
    weights = [weight, torch.randn_like(weight), torch.randn_like(weight)]
    biases = [bias, None, torch.randn_like(bias)]
    modes = [mode, torch.randn(RANK, RANK, dtype=x.dtype), torch.randn_like(mode)]
    torch.manual_seed(3)
    group = cp_linear_group(x, weights, biases, factor_in, factor_out, modes, dropout=dropout)
    torch.manual_seed(3)
    seeds = torch.randint(2**62, (3,))
    for y, w, b, m, seed in zip(group, weights, biases, modes, seeds, strict=True):
        keep = reference.keep_mask(seed, 11, RANK, dropout) if dropout else None
        alone = reference.cp_linear(x, w, b, factor_in, factor_out, m, keep=keep, dropout=dropout)
        torch.testing.assert_close(y, alone, rtol=1e-12, atol=1e-12)


def test_unused_members_of_a_group():
    x, weight, bias, factor_in, factor_out, mode = operands()
    modes = [mode, torch.randn_like(mode).requires_grad_()]
    ys = cp_linear_group(x, [weight] * 2, [bias] * 2, factor_in, factor_out, modes)
    ys[0].sum().backward()
    alone = torch.autograd.grad(cp_linear(x, weight, bias, factor_in, factor_out, mode).sum(), mode)
    torch.testing.assert_close(mode.grad, alone[0])
    assert torch.equal(modes[1].grad, torch.zeros_like(mode))


def test_strides_and_leading_dimensions():
    tensors = operands(tokens=12)
    plain = cp_linear(*tensors)
    dy = torch.randn(12, 1, dtype=torch.float64).expand(12, DIM_OUT)
    expected = torch.autograd.grad(plain, trainable(tensors), dy.contiguous())
    permuted = [t.t().contiguous().t() if t.ndim == 2 else t for t in tensors]
    folded = cp_linear(permuted[0].reshape(3, 4, DIM_IN), *permuted[1:])
    assert folded.shape == (3, 4, DIM_OUT) and folded.is_contiguous()
    grads = torch.autograd.grad(folded, trainable(tensors), dy.reshape(3, 4, DIM_OUT))
    for a, b in zip((folded.view(12, DIM_OUT), *grads), (plain, *expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_replays_the_dropout_masks(use_reentrant):
    tensors = operands()

    def function(*tensors):
        return cp_linear(*tensors, dropout=0.5)

    def run(wrap):
        for tensor in trainable(tensors):
            tensor.grad = None
        torch.manual_seed(11)
        y = wrap(function)
        torch.manual_seed(999)  # whatever else draws numbers between forward and backward
        y.square().sum().backward()
        return [y, *(t.grad for t in trainable(tensors))]

    plain = run(lambda f: f(*tensors))
    replayed = run(lambda f: checkpoint(f, *tensors, use_reentrant=use_reentrant))
    for a, b in zip(plain, replayed, strict=True):
        assert torch.equal(a, b)


def test_dropout_draws_from_the_generator_and_only_then():
    tensors = operands()
    state = torch.get_rng_state()
    cp_linear(*tensors)
    assert torch.equal(torch.get_rng_state(), state)
    first, second = cp_linear(*tensors, dropout=0.5), cp_linear(*tensors, dropout=0.5)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(cp_linear(*tensors, dropout=0.5), first)


def test_dropout_keeps_the_mean():
    x, weight, bias, factor_in, factor_out, mode = operands(tokens=1)
    many = x.expand(20_000, -1)
    exact = cp_linear(x, weight, bias, factor_in, factor_out, mode)
    mean = cp_linear(many, weight, bias, factor_in, factor_out, mode, dropout=0.3).mean(0)
    torch.testing.assert_close(mean, exact[0], rtol=0, atol=0.05)
