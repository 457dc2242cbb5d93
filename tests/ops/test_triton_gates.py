"""The Triton and CUDA backends of the two gates and their in-place form.

Without a GPU Triton's, in its interpreter on small shapes; on a GPU the same tests of both, and
full shapes.
"""

import functools
import itertools

import pytest
import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from mmadapt import nn
from mmadapt.kernels.modality_gate import reference
from mmadapt.ops import _modality_gate, _projected_modality_gate, backends
from mmadapt.ops import modality_gate as gate_op
from mmadapt.ops import projected_modality_gate as projected_op

pytest.importorskip("triton")

import triton
import triton.language as tl

from mmadapt.kernels.modality_gate.triton_tiles import tanh
from mmadapt.ops._backends.triton._configs import override
from mmadapt.ops._backends.triton._device import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*"),  # numpy's, about inf and NaN
    pytest.mark.usefixtures("poison_new_buffers"),
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(),
        reason="needs a CUDA device or TRITON_INTERPRET=1",
    ),
]
gpu = [pytest.mark.gpu, pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")]

HEADS, SIZE, WIDTH = 3, 5, 20
FP32 = (torch.float32, torch.float32)
MIXED = (torch.float16, torch.float32)
FP16 = (torch.float16, torch.float16)
BF16 = (torch.bfloat16, torch.bfloat16)


def static(tokens, dtypes=FP32, heads=HEADS, size=SIZE, width=WIDTH):
    value = torch.randn(tokens, heads, size, device=DEVICE).to(dtypes[0])
    return [value, torch.randn(heads, device=DEVICE).to(dtypes[1])]


def token(tokens, dtypes=FP32, heads=HEADS, size=SIZE, width=WIDTH):
    value, _ = static(tokens, dtypes, heads, size)
    return [value, torch.randn(tokens, heads, device=DEVICE).to(dtypes[1])]


def projected(tokens, dtypes=FP32, heads=HEADS, size=SIZE, width=WIDTH):
    value, _ = static(tokens, dtypes, heads, size)
    hidden = torch.randn(tokens, width, device=DEVICE).to(dtypes[0])
    weight = torch.randn(heads, width, device=DEVICE) / max(width, 1) ** 0.5
    return [value, hidden, weight.to(dtypes[1])]


CASES = {
    "static": (static, gate_op, reference.modality_gate),
    "token": (token, gate_op, reference.modality_gate),
    "projected": (projected, projected_op, reference.projected_modality_gate),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


NO_CUDA = backends("modality_gate")["cuda"]
CUDA = pytest.param(
    "cuda", marks=[*gpu, pytest.mark.skipif(NO_CUDA is not None, reason=f"backend cuda: {NO_CUDA}")]
)


@pytest.fixture(params=["triton", CUDA])
def backend(request):
    return request.param


def ours(op, backend):
    return functools.partial(op, backend=backend)


def inplace(op, backend):
    """`op` in place, on a copy, so that leaves can be differentiated."""

    def run(value, *others):
        copy = value * 1
        y = op(copy, *others, inplace=True, backend=backend)
        assert y is copy
        return y

    return run


def runs_mask(tokens, length=6):
    """Runs of masked and unmasked tokens: tiles without, with some and with masked tokens alone."""
    return (torch.arange(tokens, device=DEVICE) // length) % 4 == 1


def leaves(tensors, needs=None):
    needs = [True] * len(tensors) if needs is None else needs
    return [t.detach().clone().requires_grad_(n) for t, n in zip(tensors, needs, strict=True)]


def value_and_grads(function, tensors, mask, dy):
    tensors = leaves(tensors)
    y = function(*tensors, mask)
    return [y.detach(), *torch.autograd.grad(y, tensors, dy)]


def eager_and_exact(formula, tensors, mask, dy):
    """By autograd: in the activations' dtype with gradients in each tensor's own, and in fp64."""
    same = leaves(tensors)
    y = formula(*(t.to(dy.dtype) for t in same), mask)
    eager = [y.detach(), *torch.autograd.grad(y, same, dy)]
    return eager, value_and_grads(formula, [t.double() for t in tensors], mask, dy.double())


def check_error_rule(rule, results, formula, tensors, mask, dy, largest=True):
    eager, exact = eager_and_exact(formula, tensors, mask, dy)
    for actual, same, true in zip(results, eager, exact, strict=True):
        if INTERPRETED and dy.dtype == torch.bfloat16:
            # The interpreter truncates where it converts to bf16; the GPU rounds.
            assert actual.dtype == same.dtype
            assert (actual.double() - true).norm() <= 0.02 * true.norm() + 1e-12
        else:
            rule(actual, same, true, largest=largest)


@pytest.mark.parametrize(
    ("place", "dtypes"),
    [("fresh", dtypes) for dtypes in (FP32, MIXED, FP16, BF16)]
    + [("inplace", dtypes) for dtypes in (MIXED, BF16)]
    # Of fp32 the two forms are compared bit by bit below.
    + [pytest.param("inplace", dtypes, marks=pytest.mark.slow) for dtypes in (FP32, FP16)],
)
def test_error_rule(assert_as_good_as_eager, case, backend, dtypes, place):
    make, op, formula = case
    tensors, mask = make(37, dtypes), runs_mask(37)
    dy = torch.randn_like(tensors[0])
    results = value_and_grads(
        ours(op, backend) if place == "fresh" else inplace(op, backend), tensors, mask, dy
    )
    check_error_rule(assert_as_good_as_eager, results, formula, tensors, mask, dy)


@pytest.mark.parametrize(
    ("tokens", "heads", "size", "width"),
    [
        (1, 2, 8, 16),
        (33, 1, 1, 1),
        (199, 2, 4, 8),
        (18, 20, 36, 48),  # a ragged group, a ragged head, several pieces of a head
        (20, 70, 2, 70),  # blocks of heads in the projection's gradient, a ragged tile of columns
    ],
)
def test_shapes(assert_as_good_as_eager, case, backend, tokens, heads, size, width):
    make, op, formula = case
    tensors = make(tokens, FP32, heads, size, width)
    mask = runs_mask(tokens) if tokens > 1 else torch.ones(1, dtype=torch.bool, device=DEVICE)
    dy = torch.randn_like(tensors[0])
    results = value_and_grads(ours(op, backend), tensors, mask, dy)
    check_error_rule(
        assert_as_good_as_eager, results, formula, tensors, mask, dy, largest=tokens > 1
    )


def test_several_runs_and_tiles_give_the_same_numbers(case):
    """Tile settings change where sums are cut, not what is computed."""
    make, op, formula = case
    tensors, mask = make(70, heads=5), runs_mask(70)
    dy = torch.randn_like(tensors[0])
    expected = value_and_grads(formula, tensors, mask, dy)
    value = {"BT": 16, "HB": 2, "BC": 2, "BW": 4, "num_warps": 4}
    projection = {"BT": 16, "BD": 16, "BH": 16, "RUNS": 4, "num_warps": 4}
    configs = {
        "modality_gate_fwd": value,
        "modality_gate_bwd": value,
        "projected_modality_gate_fwd": {**value, "HB": 8, "BK": 16, "STAGES": 2},
        "projected_modality_gate_bwd": projection,
    }
    with override(configs):
        results = value_and_grads(ours(op, "triton"), tensors, mask, dy)
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", ["fresh", "inplace"])
@pytest.mark.parametrize(("tokens", "masked"), [(0, True), (37, False), (37, True)])
def test_no_token_none_masked_all_masked(case, backend, tokens, masked, place):
    make, op, formula = case
    tensors = make(tokens)
    mask = torch.full((tokens,), masked, device=DEVICE)
    dy = torch.randn_like(tensors[0])
    function = ours(op, backend) if place == "fresh" else inplace(op, backend)
    y, dvalue, *others = value_and_grads(function, tensors, mask, dy)
    if masked and tokens:
        expected = value_and_grads(formula, tensors, mask, dy)
        for a, b in zip((y, dvalue, *others), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(y, tensors[0]) and torch.equal(dvalue, dy)
        assert all(torch.equal(g, torch.zeros_like(g)) for g in others)


@pytest.mark.parametrize("place", ["fresh", "inplace"])
def test_unmasked_rows_pass_bitwise_and_reach_nothing(case, backend, place):
    """NaN and infinity in unmasked rows of everything pass, and touch no gradient."""
    make, op, _ = case
    tensors, mask = make(45, (torch.bfloat16, torch.float32)), runs_mask(45)
    dy = torch.randn_like(tensors[0])
    function = ours(op, backend) if place == "fresh" else inplace(op, backend)
    clean = value_and_grads(function, tensors, mask, dy)
    bad = torch.tensor([float("nan"), float("inf"), -float("inf")], device=DEVICE)
    dirt = bad[torch.arange(45, device=DEVICE) % 3]
    dirty = [
        torch.where(mask.view(-1, *[1] * (t.ndim - 1)), t, dirt.view(-1, *[1] * (t.ndim - 1)).to(t))
        if t.shape[0] == 45
        else t
        for t in (*tensors, dy)
    ]
    results = value_and_grads(function, dirty[:-1], mask, dirty[-1])
    bits = torch.int16
    assert torch.equal(results[0][~mask].view(bits), dirty[0][~mask].view(bits))
    assert torch.equal(results[1][~mask].view(bits), dirty[-1][~mask].view(bits))
    for index, (a, b) in enumerate(zip(results, clean, strict=True)):
        keep = mask if index < 2 else slice(None)
        assert torch.equal(a[keep], b[keep])


def test_an_infinite_weight_stays_in_masked_rows(backend):
    value, hidden, weight = leaves(projected(30))
    mask = runs_mask(30)
    with torch.no_grad():
        weight[1, 2] = float("inf")
    y = projected_op(value, hidden, weight, mask, backend=backend)
    (dhidden,) = torch.autograd.grad(y.nan_to_num().sum(), hidden)
    assert torch.equal(dhidden[~mask], torch.zeros_like(dhidden[~mask]))


@pytest.mark.parametrize("place", ["fresh", "inplace"])
def test_every_subset_of_frozen_operands(case, backend, place):
    make, op, _ = case
    tensors, mask = make(12), runs_mask(12, 3)
    dy = torch.randn_like(tensors[0])
    full = value_and_grads(ours(op, backend), tensors, mask, dy)[1:]
    for needs in itertools.product([False, True], repeat=len(tensors)):
        partial = leaves(tensors, needs)
        y = (ours(op, backend) if place == "fresh" else inplace(op, backend))(*partial, mask)
        assert y.requires_grad == any(needs)
        if any(needs):
            y.backward(dy)
        for tensor, needed, expected in zip(partial, needs, full, strict=True):
            assert (tensor.grad is not None) == needed
            if needed:
                assert torch.equal(tensor.grad, expected)


@triton.jit
def _tanh_kernel(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y_ptr + at, tanh(tl.load(x_ptr + at)))


def test_tanh_is_exact_near_zero_and_beyond():
    """Relative error below 3e-7 from denormals to saturation, on both sides of zero."""
    size = torch.logspace(-44, 1.31, 4000, base=10.0, dtype=torch.float64)
    seam = torch.linspace(0.4, 0.7, 95, dtype=torch.float64)
    x = torch.cat([size, seam, torch.tensor([0.0], dtype=torch.float64)])[:4096].float()
    x = torch.where(torch.arange(4096) % 2 == 0, x, -x).to(DEVICE)
    y = torch.empty_like(x)
    _tanh_kernel[(1,)](x, y, 4096)
    exact = torch.tanh(x.double())
    error = (y.double() - exact).abs()
    assert (error <= 3e-7 * exact.abs() + 1.5e-45).all()
    small = (x.abs() <= 1e-4) & (x.abs() > 1e-37)
    assert (error[small] <= 1.2e-7 * exact[small].abs()).all()
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 1e30] * 4, device=DEVICE)
    out = torch.empty_like(special)
    _tanh_kernel[(1,)](special, out, 16)
    assert out[:2].tolist() == [1.0, -1.0] and out[3] == 1.0 and out[2].isnan()


def test_a_gate_near_its_zero_start_is_not_rounded_away(case, backend):
    """The trainable tensor scaled by 1e-4 / 1e-12: y stays proportional to it."""
    make, op, _ = case
    value, *rest = make(16)
    mask = torch.ones(16, dtype=torch.bool, device=DEVICE)
    for scale in (1e-4, 1e-12):
        scaled = [*rest[:-1], rest[-1] * scale]
        logits = scaled[-1] if op is gate_op else scaled[0].double() @ scaled[-1].double().t()
        exact = value.double() * torch.tanh(logits.double()).unsqueeze(-1)
        y = op(value, *scaled, mask, backend=backend).double()
        assert (y - exact).norm() <= 1e-6 * exact.norm()


# The in-place form


@pytest.mark.parametrize("shape", [(4, 6), (24,)])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("backend", ["reference", "triton", CUDA])
def test_inplace_overwrites_masked_rows_of_the_callers_tensor(case, backend, split, shape):
    make, op, _ = case
    value, *rest = make(24)
    mask = runs_mask(24, 4)
    expected = op(value, *rest, mask, backend=backend)
    lead = [t.view(*shape, -1) if t.shape[0] == 24 else t for t in rest]
    ours = value.clone().view(*shape, *((HEADS, SIZE) if split else (-1,)))
    version = ours._version
    y = op(ours, *lead, mask.view(shape), inplace=True, backend=backend)
    assert y is ours and ours._version > version
    assert torch.equal(y.view_as(expected), expected)


def test_gradcheck_inplace(case):
    make, op, _ = case
    tensors = [t.double().requires_grad_() for t in make(4, heads=2, size=3, width=3)]
    mask = torch.tensor([True, False, True, True], device=DEVICE)
    assert torch.autograd.gradcheck(lambda *t: op(2 * t[0], *t[1:], mask, inplace=True), tensors)


@pytest.mark.parametrize("backend", ["reference", "triton", CUDA])
def test_gradients_equal_the_functional_form(case, backend):
    make, op, _ = case
    tensors, mask = make(29), runs_mask(29, 5)
    dy = torch.randn_like(tensors[0])
    functional = value_and_grads(functools.partial(op, backend=backend), tensors, mask, dy)
    for a, b in zip(
        value_and_grads(inplace(op, backend), tensors, mask, dy), functional, strict=True
    ):
        assert torch.equal(a, b)


def test_gating_twice_and_what_autograd_forbids(case, backend):
    make, op, _ = case
    tensors, mask = leaves(make(12)), runs_mask(12, 3)
    value, *rest = tensors
    twice = ours(op, backend)(ours(op, backend)(value * 1, *rest, mask), *rest, mask)
    again = value * 1
    for _ in range(2):
        again = op(again, *rest, mask, inplace=True, backend=backend)
    dy = torch.randn_like(twice)
    for a, b in zip(
        torch.autograd.grad(again, tensors, dy), torch.autograd.grad(twice, tensors, dy),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b)
    saved_by_exp = value.exp()
    y = op(saved_by_exp, *rest, mask, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad is being used"):
        op(value, *rest, mask, inplace=True)
    with pytest.raises(RuntimeError, match="a view of a leaf Variable that requires grad"):
        op(value.view(12, -1), *rest, mask, inplace=True)
    with torch.no_grad():
        before = value.clone()
        op(value, *rest, mask, inplace=True, backend=backend)
    assert not torch.equal(before, value)
    with torch.inference_mode():
        copy = before.clone()
        op(copy, *rest, mask, inplace=True, backend=backend)
    assert torch.equal(copy, value)


def test_backward_leaves_dy_and_can_run_twice(case, backend):
    make, op, _ = case
    tensors, mask = leaves(make(12)), runs_mask(12, 3)
    y = inplace(op, backend)(*tensors, mask)
    dy = torch.randn_like(y)
    kept = dy.clone()
    first = torch.autograd.grad(y, tensors, dy, retain_graph=True)
    second = torch.autograd.grad(y, tensors, dy)
    assert torch.equal(dy, kept)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_cannot_be_overwritten(case):
    make, op, _ = case
    value, *rest = make(12)
    mask = runs_mask(12, 3)
    strided = value.transpose(0, 1).contiguous().transpose(0, 1)
    with pytest.raises(ValueError, match=r"value has strides .*, expected a contiguous tensor"):
        op(strided, *rest, mask, inplace=True)
    if op is projected_op:
        shared = torch.randn(12, WIDTH, device=DEVICE)
        weight = torch.randn(HEADS, WIDTH, device=DEVICE)
        value = shared.view(-1)[: 12 * HEADS * SIZE].view(12, HEADS, SIZE)
        with pytest.raises(ValueError, match="shares memory"):
            op(value, shared, weight, mask, inplace=True)


def test_a_tracked_view_gets_a_new_tensor(case, backend):
    make, op, _ = case
    tensors, mask = leaves(make(12)), runs_mask(12, 3)
    value, *rest = tensors
    view = (value * 1).view(12, -1)
    y = op(view, *rest, mask, inplace=True, backend=backend)
    assert y.data_ptr() != view.data_ptr()
    assert torch.equal(y, op(view, *rest, mask, backend=backend))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_inplace_under_checkpointing(case, backend, use_reentrant):
    make, op, _ = case
    tensors, mask = leaves(make(12)), runs_mask(12, 3)

    def block(value, *rest):
        return op(2 * value, *rest, mask, inplace=True, backend=backend).sin()

    dy = torch.randn_like(tensors[0])
    plain = torch.autograd.grad(block(*tensors), tensors, dy)
    for tensor in tensors:
        tensor.grad = None
    checkpoint(block, *tensors, use_reentrant=use_reentrant).backward(dy)
    assert all(torch.equal(t.grad, b) for t, b in zip(tensors, plain, strict=True))


def test_selective_checkpointing_must_recompute_it(case, backend):
    make, op, _ = case
    tensors, mask = leaves(make(12)), runs_mask(12, 3)

    def block(value, *rest):
        y = op(2 * value, *rest, mask, inplace=True, backend=backend)
        return (y * y.detach().sum()).sin()

    def run(policy):
        def decide(context, operator, *args, **kwargs):
            here = operator.name().startswith("mmadapt::")
            return policy if here else CheckpointPolicy.PREFER_RECOMPUTE

        contexts = functools.partial(create_selective_checkpoint_contexts, decide)
        y = checkpoint(block, *tensors, use_reentrant=False, context_fn=contexts)
        return torch.autograd.grad(y, tensors, torch.ones_like(y))

    y = block(*tensors)
    plain = torch.autograd.grad(y, tensors, torch.ones_like(y))
    again = run(CheckpointPolicy.PREFER_RECOMPUTE)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    with pytest.raises(RuntimeError, match="must recompute an in-place operator"):
        run(CheckpointPolicy.MUST_SAVE)


def test_inplace_under_autocast(case):
    """In the autocast dtype it overwrites; in another one there is nothing to overwrite."""
    make, op, _ = case
    value, *rest = make(12)
    mask = runs_mask(12, 3)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        half = value.bfloat16()
        expected = op(half, *rest, mask)
        y = op(half, *rest, mask, inplace=True)
        assert y is half and torch.equal(y, expected)
        kept = value.clone()
        y = op(value, *rest, mask, inplace=True)
        assert y.dtype == torch.bfloat16 and torch.equal(value, kept)


def test_inplace_under_compile_returns_a_new_tensor(case):
    make, op, _ = case
    tensors, mask = leaves(make(12)), runs_mask(12, 3)
    torch._dynamo.reset()

    def block(value, *rest):
        return op(2 * value, *rest, mask, inplace=True).sin()

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    dy = torch.randn_like(tensors[0])
    results = [torch.autograd.grad(f(*tensors), tensors, dy) for f in (block, compiled)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["token", "static"])
def test_the_module(kind):
    gate = nn.ModalityGate(WIDTH, HEADS, kind, device=DEVICE)
    torch.nn.init.normal_(gate.gate)
    value, hidden = torch.randn(7, 15, device=DEVICE), torch.randn(7, WIDTH, device=DEVICE)
    mask = runs_mask(7, 2)
    expected = gate(value, mask, hidden)
    y = gate(value, mask, hidden, inplace=True)
    assert y is value and torch.equal(y, expected)


@pytest.mark.parametrize(
    ("name", "backend", "save"),
    [
        ("given", None, False),
        ("given", "triton", True),
        ("projected", "triton", False),
        ("projected", None, True),
        *(
            pytest.param(name, *CUDA.values, save, marks=CUDA.marks)
            for name in ("given", "projected")
            for save in (False, True)
        ),
    ],
)
def test_opcheck(name, backend, save):
    """Saved rows outside the mask are unwritten, hence a full mask where they are compared."""
    mask = runs_mask(18, 3) | save
    if name == "given":
        module, operands = _modality_gate, token(18)
    else:
        module, operands = _projected_modality_gate, projected(18)
    torch.library.opcheck(module.forward_op, (*operands, mask, backend))
    torch.library.opcheck(module.inplace_op, (*operands, mask, save, backend))


@pytest.mark.parametrize("name", ["given", "projected"])
def test_opcheck_of_backward(name, backend):
    mask = torch.ones(18, dtype=torch.bool, device=DEVICE)
    if name == "given":
        module, operands, rest = _modality_gate, token(18), []
        needs = [True, True]
    else:
        module, operands = _projected_modality_gate, projected(18)
        rest, needs = [torch.rand(18, HEADS, device=DEVICE)], [True] * 3
    dy = torch.randn_like(operands[0])
    torch.library.opcheck(module.backward_op, (dy, *operands, mask, *rest, needs, backend))


# Full size, on a GPU

FULL = {"heads": 32, "size": 128, "width": 4096}


def full_mask():
    """32 image tokens at the start of each of 16 sequences of 512."""
    return torch.arange(8192, device=DEVICE) % 512 < 32


class TestOnGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("place", ["fresh", "inplace"])
    @pytest.mark.parametrize("dtypes", [BF16, (torch.bfloat16, torch.float32), FP16, FP32])
    @pytest.mark.parametrize("share", ["runs", "half", "all"])
    def test_full_size(self, assert_as_good_as_eager, case, backend, dtypes, place, share):
        make, op, formula = case
        tensors, mask = make(8192, dtypes, **FULL), full_mask()
        if share != "runs":
            mask = torch.rand(8192, device=DEVICE) < (0.5 if share == "half" else 2)
        dy = torch.randn_like(tensors[0])
        function = ours(op, backend) if place == "fresh" else inplace(op, backend)
        results = value_and_grads(function, tensors, mask, dy)
        check_error_rule(assert_as_good_as_eager, results, formula, tensors, mask, dy)

    @pytest.mark.parametrize("dtypes", [BF16, FP32])
    def test_many_tokens(self, assert_as_good_as_eager, case, backend, dtypes):
        """More than a block lists at a time (8192); the last ones of a list of uneven length."""
        make, op, formula = case
        tensors = make(20011, dtypes, heads=3, size=16, width=40)
        mask = torch.rand(20011, device=DEVICE) < 0.3
        mask[8192:16384] = False
        dy = torch.randn_like(tensors[0])
        results = value_and_grads(ours(op, backend), tensors, mask, dy)
        check_error_rule(assert_as_good_as_eager, results, formula, tensors, mask, dy)

    @pytest.mark.parametrize("place", ["fresh", "inplace"])
    def test_a_graph_follows_the_mask(self, case, backend, place):
        make, op, _ = case
        tensors, mask = make(2048, BF16, **FULL), runs_mask(2048, 32)
        dy = torch.randn_like(tensors[0])
        function = ours(op, backend) if place == "fresh" else inplace(op, backend)
        static = leaves(tensors)

        def step():
            y = function(*static, mask)
            return [y.detach(), *torch.autograd.grad(y, static, dy)]

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for share in (0.0, 0.3, 1.0):
            mask.copy_(torch.rand(2048, device=DEVICE) < share)
            graph.replay()
            for a, b in zip(captured, step(), strict=True):
                assert torch.equal(a, b)

    @pytest.mark.parametrize("place", ["fresh", "inplace"])
    def test_ten_runs_are_bit_equal(self, case, backend, place):
        make, op, _ = case
        tensors, mask = make(8192, BF16, **FULL), full_mask()
        dy = torch.randn_like(tensors[0])
        function = ours(op, backend) if place == "fresh" else inplace(op, backend)
        first = value_and_grads(function, tensors, mask, dy)
        for _ in range(10):
            again = value_and_grads(function, tensors, mask, dy)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

    def test_two_streams(self, case, backend):
        make, op, _ = case
        problems = [(make(4096, BF16, **FULL), runs_mask(4096, 7 + i)) for i in range(2)]
        dy = torch.randn_like(problems[0][0][0])
        expected = [value_and_grads(inplace(op, backend), *problem, dy) for problem in problems]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in problems]
        for _ in range(5):
            results = []
            for stream, problem in zip(streams, problems, strict=True):
                with torch.cuda.stream(stream):
                    results.append(value_and_grads(inplace(op, backend), *problem, dy))
            torch.cuda.synchronize()
            for result, truth in zip(results, expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(result, truth, strict=True))

    @pytest.mark.parametrize("place", ["fresh", "inplace"])
    def test_no_call_waits_for_the_device(self, case, backend, place):
        make, op, _ = case
        tensors, mask = make(512, BF16, **FULL), runs_mask(512)
        dy = torch.randn_like(tensors[0])
        function = ours(op, backend) if place == "fresh" else inplace(op, backend)
        value_and_grads(function, tensors, mask, dy)
        torch.cuda.set_sync_debug_mode("error")
        try:
            value_and_grads(function, tensors, mask, dy)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_automatic_choice(self, case):
        from mmadapt.ops import explain

        make, op, _ = case
        tensors, mask = make(512, BF16, **FULL), runs_mask(512)
        assert explain(op, *tensors, mask).backend == "triton"
        assert explain(op, *tensors, mask, inplace=True).backend == "triton"
