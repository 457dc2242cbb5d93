"""The formulas themselves: gradients, published golden values, special cases."""

import ast
from pathlib import Path

import pytest
import torch
from torch.autograd import gradcheck

from mmadapt.kernels import cp_linear, modality_gate, swiglu_adapter
from mmadapt.kernels.cp_linear.reference import apply_mode, keep_mask
from mmadapt.kernels.cp_linear.reference import cp_linear as cp_formula
from mmadapt.kernels.modality_gate.reference import modality_gate as gate_formula
from mmadapt.kernels.modality_gate.reference import projected_modality_gate as projected_formula
from mmadapt.kernels.swiglu_adapter.reference import rms_norm
from mmadapt.kernels.swiglu_adapter.reference import swiglu_adapter as swiglu_formula


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def leaf(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("residual", ["input", "norm", "none"])
@pytest.mark.parametrize("share_up", [False, True])
def test_swiglu_gradcheck(residual, share_up):
    expert = torch.tensor([1, -1, 0, 1])

    def function(x, gate, down, up, norm):
        return swiglu_formula(
            x, gate, down, up, expert=expert, norm=(norm, 1e-5), residual=residual, scale=0.7
        )

    up = leaf(1 if share_up else 2, 5, 3)
    assert gradcheck(function, (leaf(4, 5), leaf(2, 3, 5), leaf(2, 3, 5), up, leaf(5)))


@pytest.mark.parametrize("mode", [(3,), (3, 3)])
@pytest.mark.parametrize("dropout_at", ["after", "before"])
def test_cp_gradcheck(mode, dropout_at):
    weight = leaf(4, 5).detach()
    keep = torch.rand(6, 3) < 0.5

    def function(x, bias, *rest):
        return cp_formula(
            x, weight, bias, *rest, scale=0.7, keep=keep, dropout=0.5, dropout_at=dropout_at
        )

    assert gradcheck(function, (leaf(6, 5), leaf(4), leaf(3, 5), leaf(4, 3), leaf(*mode)))


@pytest.mark.parametrize("logits", [(2,), (4, 2)])
def test_gate_gradcheck(logits):
    mask = torch.tensor([True, False, True, False])
    assert gradcheck(lambda v, a: gate_formula(v, a, mask), (leaf(4, 2, 3), leaf(*logits)))


def test_projected_gate_gradcheck():
    mask = torch.tensor([True, False, True, False])
    assert gradcheck(
        lambda v, h, w: projected_formula(v, h, w, mask), (leaf(4, 2, 3), leaf(4, 5), leaf(2, 5))
    )


def test_rms_norm_equals_torch():
    x, weight = leaf(7, 12), leaf(12)
    expected = torch.nn.functional.rms_norm(x, (12,), weight, 1e-5)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), expected)


def test_rms_norm_rounds_before_the_weight():
    """LLaMA's order in bf16: normalise in fp32, round, then multiply."""
    x, weight = torch.randn(64, 32).bfloat16(), torch.randn(32).bfloat16()
    wide = x.float()
    unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    assert torch.equal(rms_norm(x, weight, 1e-5), unit.bfloat16() * weight)


def crome_matrix(k, rows, columns):
    """Matrix number k of CROME's golden forward, transposed to [out, in]."""
    i = torch.arange(rows, dtype=torch.float64)[:, None]
    j = torch.arange(columns, dtype=torch.float64)
    return (0.5 * torch.sin(1 + i * columns + j + 10 * k)).t()


@pytest.mark.parametrize(
    ("silu_on_down", "visual", "text"),
    [
        (
            True,
            (0.054502, -1.706094, 0.682489, 2.903293),
            (0.202061, 0.445556, -0.760894, 1.042672),
        ),
        (
            False,
            (0.815681, -1.116866, 0.558033, 2.179577),
            (0.171292, 0.413514, -0.764749, 1.070548),
        ),
    ],
)
def test_crome_golden_forward(silu_on_down, visual, text):
    pairs = [(crome_matrix(0, 4, 2), crome_matrix(1, 4, 2))]
    pairs += [(crome_matrix(2, 4, 2), crome_matrix(3, 4, 2))]
    if not silu_on_down:
        pairs = [(b, a) for a, b in pairs]
    gate, down = (torch.stack(weights) for weights in zip(*pairs, strict=True))
    x = torch.tensor([[1, -1, 0.5, 2], [0.25, 0.5, -0.75, 1]], dtype=torch.float64)
    up = crome_matrix(4, 2, 4)[None]
    y = swiglu_formula(x, gate, down, up, expert=torch.tensor([0, 1]))
    expected = torch.tensor([visual, text], dtype=torch.float64)
    torch.testing.assert_close(y, expected, rtol=0, atol=5e-7)


def test_stacked_select_and_split_forms_agree():
    """PILL's experts as one masked product, as both-then-select, and row by row."""
    x, gate, down, up = leaf(9, 6), leaf(2, 3, 6), leaf(2, 3, 6), leaf(2, 6, 3)
    expert = torch.randint(0, 2, (9,))
    routed = swiglu_formula(x, gate, down, up, expert=expert)
    hidden = torch.nn.functional.silu(x @ gate.flatten(0, 1).t()) * (x @ down.flatten(0, 1).t())
    own = torch.nn.functional.one_hot(expert, 2).repeat_interleave(3, dim=1)
    stacked = x + (hidden * own) @ up.transpose(1, 2).flatten(0, 1)
    rows = [
        swiglu_formula(x[t : t + 1], gate[e : e + 1], down[e : e + 1], up[e : e + 1])
        for t, e in enumerate(expert.tolist())
    ]
    torch.testing.assert_close(stacked, routed)
    torch.testing.assert_close(torch.cat(rows), routed)


def test_superdiagonal_core_is_the_diagonal_mode():
    z, mode = leaf(5, 4), leaf(4)
    torch.testing.assert_close(apply_mode(z, mode), apply_mode(z, torch.diag(mode)))


def test_keep_mask_rate_and_independence():
    seeds = torch.tensor([1, 2, 2**61])
    masks = [keep_mask(seed, 2500, 400, 0.1).double() for seed in seeds]
    for mask in masks:
        assert abs(mask.mean().item() - 0.9) < 0.002
        assert abs(mask.mean(0) - 0.9).max() < 0.04
    correlations = torch.corrcoef(torch.stack([m.flatten() for m in masks]))
    assert (correlations - torch.eye(3)).abs().max() < 0.01


def test_keep_mask_is_a_function_of_seed_and_position():
    seed = torch.tensor(1234567890123456789)
    full = keep_mask(seed, 10, 8, 0.5)
    assert torch.equal(keep_mask(seed, 4, 8, 0.5), full[:4])
    assert not torch.equal(keep_mask(seed + 1, 10, 8, 0.5), full)
    assert keep_mask(seed, 10, 8, 0.0).all()
    assert keep_mask(seed, 0, 8, 0.5).shape == (0, 8)


def python_keep(seed, index, dropout):
    """Splitmix64 with Python's integers."""
    wrap = (1 << 64) - 1
    bits = (seed + index * 0x9E3779B97F4A7C15) & wrap
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & wrap
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & wrap
    return (bits >> 40) >= round(dropout * (1 << 24))


def test_keep_mask_is_splitmix64():
    seed = 4611686018427387847
    mask = keep_mask(torch.tensor(seed), 30, 7, 0.3).flatten().tolist()
    assert mask == [python_keep(seed, i, 0.3) for i in range(210)]


@pytest.mark.parametrize("package", [swiglu_adapter, cp_linear, modality_gate])
def test_a_reference_is_short_and_plain(package):
    path = Path(package.__file__).with_name("reference.py")
    source = path.read_text()
    assert len(source.splitlines()) < 60
    imported = {
        (node.module or "").partition(".")[0] if isinstance(node, ast.ImportFrom) else a.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for a in node.names
    }
    assert imported == {"torch"}
