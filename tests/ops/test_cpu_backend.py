"""The C++ backend of swiglu_adapter, called as a backend: values, gradients, routing, reruns."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from mmadapt._extension import load_extension
from mmadapt.kernels.swiglu_adapter import reference
from tests.ops.swiglu_cases import EPS, problem, run, run_exact, run_formula

extension, reason = load_extension()
if extension is None:
    pytest.skip(f"mmadapt._C is {reason}", allow_module_level=True)

from mmadapt.ops._backends import cpu  # noqa: E402  (its import fails without mmadapt._C)

pytestmark = pytest.mark.usefixtures("poison_new_buffers")

DTYPES = [
    pytest.param(torch.float32, torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bf16"),
    pytest.param(torch.bfloat16, torch.float32, id="bf16-fp32-weights"),
]


def run_cpu(*args, **settings):
    return run(cpu, *args, **settings)


@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES)
@pytest.mark.parametrize(
    ("tokens", "dim", "rank"), [(0, 24, 8), (199, 33, 7), (199, 224, 32), (2049, 65, 17)]
)
@pytest.mark.parametrize(("experts", "shared"), [(1, False), (2, False), (3, False), (3, True)])
@pytest.mark.parametrize(("norm", "residual"), [(False, "input"), (True, "norm")])
def test_error_rule(
    assert_as_good_as_eager,
    dtype, weight_dtype, tokens, dim, rank, experts, shared, norm, residual,
):  # fmt: skip
    args = problem(
        tokens, dim, rank, experts, shared=shared, norm=norm, dtypes=(dtype, weight_dtype)
    )
    ours = run_cpu(*args, residual)
    eager = run_formula(dtype, *args, residual)
    exact = run_exact(*args, residual)
    # fp32: the kernel adds in order, eager's library in blocks, so the kernel's sums are 1.2 to 1.5
    # times less exact by their mean square. The largest of thousands is then mostly luck.
    for triple in zip(ours, eager, exact, strict=True):
        assert_as_good_as_eager(*triple, largest=dtype != torch.float32)


@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES)
def test_error_rule_for_single_tokens(assert_as_good_as_eager, dtype, weight_dtype):
    # One token alone has few roundings: draws are pooled, or eager's luck decides.
    draws = []
    for _ in range(48):
        args = problem(1, 33, 7, norm=True, dtypes=(dtype, weight_dtype))
        results = run_cpu(*args, "input"), run_formula(dtype, *args, "input")
        draws.append(tuple(zip(*results, run_exact(*args, "input"), strict=True)))
    for triples in zip(*draws, strict=True):
        assert_as_good_as_eager(*(torch.stack(t) for t in zip(*triples, strict=True)))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("residual", ["input", "norm", "none"])
@pytest.mark.parametrize(("dim", "rank"), [(1, 1), (15, 16), (193, 33), (400, 200)])
def test_every_residual_and_awkward_sizes(norm, residual, dim, rank):
    args = problem(70, dim, rank, 2, norm=norm)
    for ours, exact in zip(run_cpu(*args, residual), run_exact(*args, residual), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=3e-5)


def test_saved_preactivations_and_rstd():
    x, gate, down, up, expert, weight, _ = problem(50, 40, 9, 2, norm=True)
    _, zg, zd, rstd = cpu.forward(x, gate, down, up, expert, weight, EPS, "input", 1.0)
    n = reference.rms_norm(x, weight, EPS)
    for saved, matrix in ((zg, gate), (zd, down)):
        routed = torch.einsum("td,emd->etm", n, matrix)
        expected = torch.where((expert == 1)[:, None], routed[1], routed[0])
        expected[expert < 0] = 0
        torch.testing.assert_close(saved, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rstd, torch.rsqrt(x.square().mean(-1) + EPS))


def test_tokens_without_expert_are_the_base_bitwise():
    x, gate, down, up, _, _, dy = problem(30, 50, 8, 2)
    nobody = torch.full((30,), -1, dtype=torch.int32)
    y, dx, *grads = run_cpu(x, gate, down, up, nobody, None, dy, "input")
    assert torch.equal(y, x)
    assert torch.equal(dx, dy)
    assert all(not g.any() for g in grads)


def test_expert_without_tokens_has_zero_gradient():
    args = problem(60, 20, 6, 3)
    _, _, dgate, ddown, dup, _ = run_cpu(*args, "input")
    for gradient in (dgate, ddown, dup):
        assert not gradient[2].any()
        assert gradient[:2].any(-1).any(-1).all()


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=5)))
def test_only_needed_gradients_and_the_same_bits(needs):
    args = problem(45, 37, 9, 2, norm=True)
    _, *full = run_cpu(*args, "norm")
    _, *some = run_cpu(*args, "norm", needs=needs)
    for gradient, expected, needed in zip(some, full, needs, strict=True):
        assert torch.equal(gradient, expected) if needed else gradient.numel() == 0


@pytest.mark.parametrize("norm", [False, True])
def test_reruns_are_bit_equal(threads, norm):
    threads(2)
    args = problem(2500, 96, 24, 2, norm=norm)
    first = run_cpu(*args, "input")
    for _ in range(10):
        assert all(map(torch.equal, run_cpu(*args, "input"), first))


@pytest.mark.parametrize("count", [2, 3, 5])
def test_any_number_of_threads(threads, count):
    args = problem(2100, 128, 24, 3, shared=True)
    one = run_cpu(*args, "input")
    threads(count)
    many = run_cpu(*args, "input")
    # Rows are computed alone; only sums over tokens are cut differently.
    assert torch.equal(one[0], many[0])
    assert torch.equal(one[1], many[1])
    for a, b in zip(one[2:], many[2:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [80.0, -80.0, 300.0, -300.0])
def test_large_preactivations_stay_finite(value):
    x, gate, down, up, _, _, dy = problem(3, 16, 4)
    gate = torch.full_like(gate, value / 16)
    args = (torch.ones_like(x), gate, down, up, None, None, dy, "input")
    for ours, exact in zip(run_cpu(*args), run_exact(*args), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)


def test_nan_stays_in_its_row():
    args = problem(40, 32, 8)
    args[0][7, 3] = float("nan")
    y, _, _, _ = cpu.forward(*args[:6], EPS, "input", 1.0)
    assert torch.equal(y.isnan().any(-1).nonzero(), torch.tensor([[7]]))


def test_expert_out_of_range_is_an_error_not_a_write():
    x, gate, down, up, _, _, _ = problem(4, 8, 2, 2)
    for bad in (2, -2):
        expert = torch.tensor([0, 1, bad, 0], dtype=torch.int32)
        with pytest.raises(ValueError, match="expert"):
            cpu.forward(x, gate, down, up, expert, None, EPS, "input", 1.0)


def test_unsupported_names_the_constraint():
    x, gate, down, up, expert, weight, _ = problem(4, 8, 2)
    assert cpu.unsupported(x, gate, down, up, expert, weight) is None
    assert "float16" in cpu.unsupported(x.half(), gate, down, up, expert, weight)
    assert "meta" in cpu.unsupported(x.to("meta"), gate, down, up, expert, weight)
    assert "down" in cpu.unsupported(x, gate, down.bfloat16(), up, expert, weight)
    assert "differ" in cpu.unsupported(x.bfloat16(), gate, down.bfloat16(), up, expert, weight)


@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_other_instruction_sets(isa):
    """The tests of values again in a process that may not use the newest instructions."""
    if os.environ.get("MMADAPT_CPU_ISA"):
        pytest.skip("already inside")
    if isa not in extension.build_info()["isa_compiled"]:
        pytest.skip(f"{isa} is not compiled in on this machine")
    selection = "awkward or single_tokens or only_needed or large_pre"
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-n", "0", "-k", selection]
    environment = {**os.environ, "MMADAPT_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
