"""swiglu_adapter against its formula: values, gradients, routing, freezing."""

import itertools

import pytest
import torch

from mmadapt.kernels.swiglu_adapter import reference
from mmadapt.ops import swiglu_adapter

RESIDUALS = ("input", "norm", "none")
pytestmark = pytest.mark.usefixtures("poison_new_buffers")


def call(function, operands, expert, residual="input", scale=0.7, **settings):
    x, gate, down, up, *norm = operands
    norm = (norm[0], 1e-5) if norm else None
    return function(
        x, gate, down, up, expert=expert, norm=norm, residual=residual, scale=scale, **settings
    )


def value_and_grads(function, operands, expert, dy, **settings):
    y = call(function, operands, expert, **settings)
    return [y, *torch.autograd.grad(y, operands, dy)]


@pytest.mark.parametrize("share_up", [False, True])
@pytest.mark.parametrize(
    ("norm", "residual"), [(True, r) for r in RESIDUALS] + [(False, "input"), (False, "none")]
)
def test_fp64_equals_the_formula(swiglu, share_up, norm, residual):
    operands = swiglu(share_up=share_up, norm=norm, experts=3)
    expert = torch.tensor([0, 2, -1, 2, 0, 0, -1, 1, 2, 1, 0])
    dy = torch.randn_like(operands[0])
    ours = value_and_grads(swiglu_adapter, operands, expert, dy, residual=residual)
    theirs = value_and_grads(reference.swiglu_adapter, operands, expert, dy, residual=residual)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_gradcheck(swiglu):
    operands = swiglu(tokens=4, dim=5, rank=3, norm=True)
    expert = torch.tensor([1, -1, 0, 1])

    def function(*operands):
        return call(swiglu_adapter, operands, expert, residual="norm")

    assert torch.autograd.gradcheck(function, operands)


@pytest.mark.parametrize("tokens", [0, 1, 199, pytest.param(8192, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("dim", "rank"), [(24, 8), (37, 5)])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
)
@pytest.mark.parametrize("residual", ["input", "norm"])
def test_error_rule(
    backend, swiglu, assert_as_good_as_eager, tokens, dim, rank, dtype, weight_dtype, residual
):
    # One token has only `rank` hidden values to err on: pool draws, or eager's luck decides.
    draws = [
        _errors_of_one_draw(backend, swiglu, tokens, dim, rank, dtype, weight_dtype, residual)
        for _ in range(32 if tokens == 1 else 1)
    ]
    for triples in zip(*draws, strict=True):
        pooled = (torch.stack(t) for t in zip(*triples, strict=True))
        assert_as_good_as_eager(*pooled, largest=tokens > 1)


def _errors_of_one_draw(backend, swiglu, tokens, dim, rank, dtype, weight_dtype, residual):
    """(ours, eager, exact) for the output and every gradient."""
    operands = swiglu(
        tokens=tokens, dim=dim, rank=rank, norm=True, dtype=dtype, weight_dtype=weight_dtype
    )
    expert = torch.randint(-1, 2, (tokens,))
    dy = torch.randn(tokens, dim).to(dtype)
    ours = value_and_grads(swiglu_adapter, operands, expert, dy, residual=residual, backend=backend)
    wide = [t.detach().double().requires_grad_() for t in operands]
    exact = value_and_grads(reference.swiglu_adapter, wide, expert, dy.double(), residual=residual)
    # Eager torch has no mixed product: its weights are cast to the activation dtype and the
    # gradient flows back through the cast.
    cast = [t if t.dtype == dtype else t.to(dtype) for t in operands]
    y = call(reference.swiglu_adapter, cast, expert, residual=residual)
    eager = [y, *torch.autograd.grad(y, operands, dy)]
    return list(zip(ours, eager, exact, strict=True))


def test_weight_gradients_keep_the_weight_dtype(backend, swiglu):
    operands = swiglu(dtype=torch.bfloat16, weight_dtype=torch.float32)
    y = call(swiglu_adapter, operands, torch.zeros(11, dtype=torch.int64), backend=backend)
    grads = torch.autograd.grad(y, operands, torch.ones_like(y))
    assert y.dtype == grads[0].dtype == torch.bfloat16
    assert {g.dtype for g in grads[1:]} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_run_on_the_reference(swiglu, dtype):
    operands = swiglu(dtype=dtype)
    y = call(swiglu_adapter, operands, torch.zeros(11, dtype=torch.int32))
    assert y.dtype == dtype and torch.isfinite(y).all()


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=5)))
def test_every_subset_of_frozen_operands(backend, swiglu, needs):
    operands = swiglu(tokens=7, norm=True, dtype=torch.float32)
    expert = torch.tensor([0, 1, 1, -1, 0, 0, 1])
    dy = torch.randn_like(operands[0])
    full = value_and_grads(swiglu_adapter, operands, expert, dy, residual="norm", backend=backend)
    partial = [t.detach().requires_grad_(n) for t, n in zip(operands, needs, strict=True)]
    y = call(swiglu_adapter, partial, expert, residual="norm", backend=backend)
    assert y.requires_grad == any(needs)
    torch.testing.assert_close(y, full[0], rtol=0, atol=0)
    if not any(needs):
        return
    y.backward(dy)
    for tensor, needed, expected in zip(partial, needs, full[1:], strict=True):
        if needed:
            torch.testing.assert_close(tensor.grad, expected)
        else:
            assert tensor.grad is None


def test_frozen_operands_get_no_buffer(swiglu):
    from mmadapt.ops._swiglu_adapter import arguments, backward_op, forward_op

    args = arguments(*(t.detach() for t in swiglu(experts=1)))
    _, *saved = forward_op(*args, None)
    grads = backward_op(
        torch.ones_like(args.x), *args[:7], *saved, "input", 1.0, [True, *[False] * 4], None
    )
    assert [g.numel() for g in grads] == [args.x.numel(), 0, 0, 0, 0]


def test_experts_nobody_chose_get_zero_gradients(backend, swiglu):
    operands = swiglu(dtype=torch.float32, experts=3)
    y = call(swiglu_adapter, operands, torch.full((11,), 2), backend=backend)
    grads = torch.autograd.grad(y, operands, torch.randn_like(y))
    for grad in grads[1:]:
        assert torch.equal(grad[:2], torch.zeros_like(grad[:2]))
        assert grad[2].abs().min() > 0


@pytest.mark.parametrize("share_up", [False, True])
def test_tokens_without_an_adapter_get_the_base(backend, swiglu, share_up):
    operands = swiglu(dtype=torch.float32, share_up=share_up)
    expert = torch.full((11,), -1)
    y = call(swiglu_adapter, operands, expert, backend=backend)
    assert torch.equal(y, operands[0])
    assert y.data_ptr() != operands[0].data_ptr()
    grads = torch.autograd.grad(y, operands, torch.ones_like(y))
    assert torch.equal(grads[0], torch.ones_like(y))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads[1:])


@pytest.mark.parametrize("residual", RESIDUALS)
def test_zero_up_is_the_base_bitwise(backend, swiglu, residual):
    operands = swiglu(dtype=torch.float32, norm=True)
    with torch.no_grad():
        operands[3].zero_()
    expert = torch.randint(-1, 2, (11,))
    y = call(swiglu_adapter, operands, expert, residual=residual, backend=backend)
    bare = call(swiglu_adapter, operands, torch.full((11,), -1), residual=residual, backend=backend)
    assert torch.equal(y, bare)


def test_experts_do_not_touch_foreign_tokens(backend, swiglu):
    operands = [t.detach() for t in swiglu(dtype=torch.float32)]
    expert = torch.tensor([0, 1] * 5 + [0])
    before = call(swiglu_adapter, operands, expert, backend=backend)
    for weight in operands[1:]:
        weight[1] = float("nan")
    after = call(swiglu_adapter, operands, expert, backend=backend)
    assert torch.equal(after[expert == 0], before[expert == 0])
    assert after[expert == 1].isnan().any()


def test_expanded_and_permuted_operands(backend, swiglu):
    x, gate, down, up = (t.detach() for t in swiglu(dtype=torch.float32, experts=1))
    plain = swiglu_adapter(x, gate, down, up, backend=backend)
    permuted = swiglu_adapter(
        x.t().contiguous().t(),
        gate[0].t().contiguous().t(),
        down[0].t().contiguous().t(),
        up[0].t().contiguous().t(),
        backend=backend,
    )
    assert torch.equal(plain, permuted)
    assert permuted.is_contiguous()
    row = swiglu_adapter(x[:1].expand(11, -1), gate, down, up, backend=backend)
    torch.testing.assert_close(row, plain[:1].expand(11, -1))


@pytest.mark.parametrize("gradient", ["expanded", "permuted"])
def test_gradients_without_dense_strides(backend, swiglu, gradient):
    operands = swiglu(dtype=torch.float32, norm=True)
    expert = torch.randint(-1, 2, (11,))
    y = call(swiglu_adapter, operands, expert, backend=backend)
    dy = torch.randn(24, 11).t() if gradient == "permuted" else torch.ones(()).expand(11, 24)
    strided = torch.autograd.grad(y, operands, dy, retain_graph=True)
    dense = torch.autograd.grad(y, operands, dy.contiguous())
    for a, b in zip(strided, dense, strict=True):
        assert torch.equal(a, b)


def test_leading_dimensions_are_free(backend, swiglu):
    x, gate, down, up = (t.detach() for t in swiglu(tokens=12, dtype=torch.float32))
    expert = torch.randint(-1, 2, (12,))
    flat = swiglu_adapter(x, gate, down, up, expert=expert, backend=backend)
    folded = swiglu_adapter(
        x.view(2, 3, 2, 24), gate, down, up, expert=expert.view(2, 3, 2), backend=backend
    )
    assert torch.equal(folded, flat.view(2, 3, 2, 24))
    single = swiglu_adapter(x[0], gate, down, up, expert=expert[0], backend=backend)
    torch.testing.assert_close(single, flat[0])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_integer_types_of_expert(swiglu, dtype):
    x, gate, down, up = (t.detach() for t in swiglu())
    expert = torch.tensor([0, 1] * 5 + [1])
    expected = swiglu_adapter(x, gate, down, up, expert=expert)
    assert torch.equal(swiglu_adapter(x, gate, down, up, expert=expert.to(dtype)), expected)


def test_reruns_are_bit_equal(backend, swiglu):
    operands = swiglu(tokens=199, dtype=torch.float32, norm=True)
    expert = torch.randint(-1, 2, (199,))
    dy = torch.randn_like(operands[0])
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = (
            value_and_grads(swiglu_adapter, operands, expert, dy, backend=backend) for _ in range(4)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_backward_twice(backend, swiglu):
    operands = swiglu(dtype=torch.float32, norm=True)
    y = call(swiglu_adapter, operands, torch.randint(-1, 2, (11,)), backend=backend)
    dy = torch.randn_like(y)
    first = torch.autograd.grad(y, operands, dy, retain_graph=True)
    second = torch.autograd.grad(y, operands, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_double_backward_is_refused(swiglu):
    operands = swiglu()
    y = call(swiglu_adapter, operands, torch.zeros(11, dtype=torch.int32))
    dy = torch.ones_like(y, requires_grad=True)
    (dx,) = torch.autograd.grad(y, operands[:1], dy, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
