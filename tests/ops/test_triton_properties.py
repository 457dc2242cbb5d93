"""Drawn shapes and routings: the Triton kernels (and CUDA's of the gates) agree in fp32 with their
formulas in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmadapt.kernels.cp_linear import reference as cp_reference
from mmadapt.kernels.modality_gate import reference as gate_reference
from mmadapt.kernels.swiglu_adapter import reference as swiglu_reference
from mmadapt.ops import (
    backends,
    cp_linear_group,
    modality_gate,
    projected_modality_gate,
    swiglu_adapter,
)

pytest.importorskip("triton")

from mmadapt.ops._backends.triton._device import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*"),  # numpy's, about inf and NaN
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(),
        reason="needs a CUDA device or TRITON_INTERPRET=1",
    ),
]
NO_CUDA = backends("modality_gate")["cuda"]
cuda = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device"),
        pytest.mark.skipif(NO_CUDA is not None, reason=f"backend cuda: {NO_CUDA}"),
    ],
)
few = settings(max_examples=8, deadline=None, derandomize=True)
tokens_, sizes, seeds = st.integers(0, 40), st.integers(1, 40), st.integers(0, 2**31)


def leaf(*shape):
    """Rows of about unit length, so that results are about 1 whatever the sizes."""
    return torch.randn(shape, device=DEVICE) / max(shape[-1], 1) ** 0.5


def agree(ours, formula, operands):
    """`ours` and `formula` map operands to a tuple; outputs and gradients where one is drawn."""
    results = []
    dys = None
    for function, dtype in ((ours, torch.float32), (formula, torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in operands]
        ys = function(*leaves)
        dys = [torch.randn_like(y) for y in ys] if dys is None else dys
        grads = torch.autograd.grad(
            ys, leaves, [dy.to(dtype) for dy in dys], allow_unused=True, materialize_grads=True
        )
        results.append([*ys, *grads])
    for actual, exact in zip(*results, strict=True):
        assert actual.dtype == torch.float32
        largest = exact.abs().max().item() if exact.numel() else 0.0
        torch.testing.assert_close(actual.double(), exact, rtol=1e-4, atol=1e-6 + 2e-5 * largest)


@few
@given(
    tokens=tokens_,
    dim=sizes,
    rank=st.integers(1, 33),
    experts=st.integers(1, 5),
    share_up=st.booleans(),
    with_norm=st.booleans(),
    residual=st.sampled_from(["input", "norm", "none"]),
    scale=st.floats(-2, 2),
    seed=seeds,
)
def test_swiglu_adapter(tokens, dim, rank, experts, share_up, with_norm, residual, scale, seed):
    torch.manual_seed(seed)
    expert = torch.randint(-1, experts, (tokens,), device=DEVICE)
    ups = 1 if share_up else experts
    operands = [torch.randn(tokens, dim, device=DEVICE), leaf(experts, rank, dim)]
    operands += [leaf(experts, rank, dim), leaf(ups, dim, rank)]
    if with_norm or residual == "norm":
        operands.append(1 + 0.1 * torch.randn(dim, device=DEVICE))

    def call(function, **more):
        def run(x, gate, down, up, *norm):
            norm = (norm[0], 1e-2) if norm else None
            settings = {"expert": expert, "norm": norm, "residual": residual, "scale": scale}
            return (function(x, gate, down, up, **settings, **more),)

        return run

    agree(call(swiglu_adapter, backend="triton"), call(swiglu_reference.swiglu_adapter), operands)


@few
@given(
    tokens=tokens_,
    dims=st.tuples(sizes, sizes, st.integers(1, 33)),
    dense=st.lists(st.booleans(), min_size=1, max_size=3),
    dropout=st.sampled_from([0.0, 0.4]),
    dropout_at=st.sampled_from(["after", "before"]),
    scale=st.floats(-2, 2),
    seed=seeds,
)
def test_cp_linear(tokens, dims, dense, dropout, dropout_at, scale, seed):
    torch.manual_seed(seed)
    dim_in, dim_out, rank = dims
    count = len(dense)
    weights = [leaf(dim_out, dim_in) for _ in dense]
    operands = [leaf(tokens, dim_in), leaf(rank, dim_in), leaf(dim_out, rank), leaf(dim_out)]
    operands += [leaf(rank, rank) if d else torch.randn(rank, device=DEVICE) for d in dense]
    settings = {"scale": scale, "dropout": dropout, "dropout_at": dropout_at}

    def ours(x, factor_in, factor_out, bias, *modes):
        torch.manual_seed(seed)
        biases = [bias, *[None] * (count - 1)]
        return cp_linear_group(
            x, weights, biases, factor_in, factor_out, modes, **settings, backend="triton"
        )

    def formula(x, factor_in, factor_out, bias, *modes):
        torch.manual_seed(seed)  # the same seeds of the masks as above
        masks = torch.randint(2**62, (count,), device=DEVICE)
        biases = [bias, *[None] * (count - 1)]
        return [
            cp_reference.cp_linear(
                x, w.double(), b, factor_in, factor_out, m, **settings,
                keep=cp_reference.keep_mask(s, tokens, rank, dropout) if dropout else None,
            )
            for w, b, m, s in zip(weights, biases, modes, masks, strict=True)
        ]  # fmt: skip

    agree(ours, formula, operands)


@pytest.mark.parametrize("backend", ["triton", cuda])
@few
@given(
    kind=st.sampled_from(["static", "token", "projected"]),
    inplace=st.booleans(),
    tokens=tokens_,
    heads=st.integers(1, 5),
    size=st.integers(1, 20),
    width=sizes,
    share=st.sampled_from([0.1, 0.5, 0.9]),
    seed=seeds,
)
def test_gates(backend, kind, inplace, tokens, heads, size, width, share, seed):
    torch.manual_seed(seed)
    mask = torch.rand(tokens, device=DEVICE) < share
    operands = [torch.randn(tokens, heads, size, device=DEVICE)]
    if kind == "projected":
        operands += [torch.randn(tokens, width, device=DEVICE), leaf(heads, width)]
        op, formula = projected_modality_gate, gate_reference.projected_modality_gate
    else:
        shape = (heads,) if kind == "static" else (tokens, heads)
        operands.append(torch.randn(shape, device=DEVICE))
        op, formula = modality_gate, gate_reference.modality_gate

    def ours(value, *rest):
        value = value * 1 if inplace else value  # a leaf cannot be overwritten
        return (op(value, *rest, mask, inplace=inplace, backend=backend),)

    agree(ours, lambda *operands: (formula(*operands, mask),), operands)
