"""Drawn shapes and routings: the operators agree with their formulas in fp64."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmadapt.kernels.cp_linear import reference as cp_reference
from mmadapt.kernels.modality_gate import reference as gate_reference
from mmadapt.kernels.swiglu_adapter import reference as swiglu_reference
from mmadapt.ops import cp_linear, modality_gate, swiglu_adapter

few = settings(max_examples=25, deadline=None, derandomize=True)
sizes = st.integers(1, 19)


def agree(ours, theirs, inputs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    dy = torch.randn_like(theirs)
    grads = (torch.autograd.grad(y, inputs, dy, allow_unused=True) for y in (ours, theirs))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(
            a, torch.zeros_like(a) if b is None else b, rtol=1e-9, atol=1e-10
        )


def leaf(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@few
@given(
    data=st.data(),
    tokens=st.integers(0, 40),
    dim=sizes,
    rank=sizes,
    experts=st.integers(1, 4),
    share_up=st.booleans(),
    residual=st.sampled_from(["input", "norm", "none"]),
    scale=st.floats(-2, 2),
    seed=st.integers(0, 2**31),
)
def test_swiglu_adapter(data, tokens, dim, rank, experts, share_up, residual, scale, seed):
    torch.manual_seed(seed)
    ids = st.lists(st.integers(-1, experts - 1), min_size=tokens, max_size=tokens)
    expert = torch.tensor(data.draw(ids), dtype=torch.int64)
    ups = 1 if share_up else experts
    inputs = [leaf(tokens, dim), leaf(experts, rank, dim), leaf(experts, rank, dim)]
    inputs.append(leaf(ups, dim, rank))
    norm = (leaf(dim), 1e-5) if residual == "norm" or data.draw(st.booleans()) else None
    settings = {"expert": expert, "norm": norm, "residual": residual, "scale": scale}
    leaves = inputs if norm is None else [*inputs, norm[0]]
    agree(
        swiglu_adapter(*inputs, **settings),
        swiglu_reference.swiglu_adapter(*inputs, **settings),
        leaves,
    )


@few
@given(
    tokens=st.integers(0, 40),
    dims=st.tuples(sizes, sizes, sizes),
    dense=st.booleans(),
    with_bias=st.booleans(),
    scale=st.floats(-2, 2),
    seed=st.integers(0, 2**31),
)
def test_cp_linear(tokens, dims, dense, with_bias, scale, seed):
    torch.manual_seed(seed)
    dim_in, dim_out, rank = dims
    weight = leaf(dim_out, dim_in).detach()
    bias = leaf(dim_out) if with_bias else None
    mode = leaf(rank, rank) if dense else leaf(rank)
    x, rest = leaf(tokens, dim_in), (leaf(rank, dim_in), leaf(dim_out, rank), mode)
    agree(
        cp_linear(x, weight, bias, *rest, scale=scale),
        cp_reference.cp_linear(x, weight, bias, *rest, scale=scale),
        [t for t in (x, bias, *rest) if t is not None],
    )


@few
@given(
    data=st.data(),
    tokens=st.integers(0, 40),
    heads=st.integers(1, 5),
    size=sizes,
    per_token=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_modality_gate(data, tokens, heads, size, per_token, seed):
    torch.manual_seed(seed)
    flags = data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    mask = torch.tensor(flags, dtype=torch.bool)
    value, logits = leaf(tokens, heads, size), leaf(tokens, heads) if per_token else leaf(heads)
    agree(
        modality_gate(value, logits, mask),
        gate_reference.modality_gate(value, logits, mask),
        [value, logits],
    )
