"""The Triton backend of swiglu_adapter, called as a backend.

Without a GPU in Triton's interpreter on small shapes; on a GPU the same tests and the full matrix.
"""

import pytest
import torch

from mmadapt.kernels.swiglu_adapter import reference
from tests.ops.swiglu_cases import EPS, problem, run, run_exact, run_formula

pytest.importorskip("triton")

from mmadapt.ops._backends.triton import swiglu_adapter as triton_backend
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
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")]

# Small tiles, so that small problems have several of them.
FUSED = {"fused": 1, "BM": 16, "BK": 64, "BN": 64, "warps": 4, "stages_k": 2, "stages_n": 2}
HALVES = {**FUSED, "fused": 0, "BR": 16, "splits": 1, "groups": 2}
SPLIT = {**HALVES, "splits": 3, "groups": 1}
WEIGHTS = {"BD": 64, "BC": 32, "BT": 16, "programs": 4, "warps": 4, "stages": 2}
PATHS = {"fused": FUSED, "halves": HALVES, "split": SPLIT}

FP32 = (torch.float32, torch.float32)
MIXED = (torch.float16, torch.float32)
HALF = (torch.bfloat16, torch.bfloat16)


@pytest.fixture(params=PATHS)
def path(request):
    """Each way to cut the problem, in small tiles."""
    settings = PATHS[request.param]
    parts = {"forward": settings, "backward": settings, "weights": WEIGHTS}
    with override({f"swiglu_adapter.{part}": config for part, config in parts.items()}):
        yield request.param


def run_triton(*args, **settings):
    return run(triton_backend, *args, **settings)


def check_error_rule(assert_as_good_as_eager, args, residual, largest=True):
    dtype = args[0].dtype
    ours, eager = run_triton(*args, residual), run_formula(dtype, *args, residual)
    for actual, same, exact in zip(ours, eager, run_exact(*args, residual), strict=True):
        if INTERPRETED and dtype == torch.bfloat16:
            # The interpreter truncates where it converts to bf16; the GPU rounds.
            if exact.numel():
                assert (actual.double() - exact).norm() <= 0.02 * exact.norm() + 1e-12
        else:
            assert_as_good_as_eager(actual, same, exact, largest=largest)


CASES = [  # dtypes, experts, shared, norm, residual
    (FP32, 1, False, False, "input"),
    (MIXED, 1, False, True, "norm"),
    (FP32, 2, False, True, "norm"),
    (MIXED, 2, False, True, "input"),
    (HALF, 2, False, True, "norm"),
    (MIXED, 3, True, False, "none"),
    (FP32, 3, True, True, "input"),
    (FP32, 5, False, True, "norm"),  # more columns than fit side by side
]


@pytest.mark.parametrize(
    ("path", "dtypes", "experts", "shared", "norm", "residual"),
    [  # two of the three paths per case, the third in the long run
        pytest.param(name, *case, marks=[pytest.mark.slow] if (i + j) % 3 == 2 else [])
        for i, case in enumerate(CASES)
        for j, name in enumerate(PATHS)
    ],
    indirect=["path"],
)
def test_error_rule(assert_as_good_as_eager, path, dtypes, experts, shared, norm, residual):
    args = problem(
        27, 80, 20, experts, shared=shared, norm=norm, dtypes=dtypes, device=DEVICE, runs=5
    )
    check_error_rule(assert_as_good_as_eager, args, residual)


@pytest.mark.parametrize(
    ("tokens", "dim", "rank"), [(0, 33, 7), (1, 1, 1), (1, 33, 7), (17, 64, 32)]
)
def test_awkward_sizes(path, tokens, dim, rank):
    args = problem(tokens, dim, rank, 2, norm=True, device=DEVICE)
    for ours, exact in zip(run_triton(*args, "norm"), run_exact(*args, "norm"), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("rank", [129, 256])
def test_large_rank_with_default_settings(rank):
    args = problem(8, 32, rank, device=DEVICE)
    for ours, exact in zip(run_triton(*args, "input"), run_exact(*args, "input"), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=3e-5)


def test_saved_preactivations_and_rstd(path):
    x, gate, down, up, expert, weight, _ = problem(30, 40, 9, 2, norm=True, device=DEVICE)
    _, zg, zd, rstd = triton_backend.forward(x, gate, down, up, expert, weight, EPS, "input", 1.0)
    n = reference.rms_norm(x, weight, EPS)
    for saved, matrix in ((zg, gate), (zd, down)):
        routed = torch.einsum("td,emd->etm", n, matrix)
        expected = torch.where((expert == 1)[:, None], routed[1], routed[0])
        expected[expert < 0] = 0
        torch.testing.assert_close(saved, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rstd, torch.rsqrt(x.square().mean(-1) + EPS))


@pytest.mark.parametrize("shared", [False, True])
def test_tokens_without_expert_are_the_base_bitwise(path, shared):
    x, gate, down, up, _, _, dy = problem(20, 50, 8, 2, shared=shared, device=DEVICE)
    gate[0, 0, 0] = down[1, 0, 0] = up[0, 0, 0] = float("inf")  # weights nobody asked for
    nobody = torch.full((20,), -1, dtype=torch.int32, device=DEVICE)
    y, dx, *grads = run_triton(x, gate, down, up, nobody, None, dy, "input")
    assert torch.equal(y, x)
    assert torch.equal(dx, dy)
    assert all(not g.any() for g in grads)


def test_expert_without_tokens_has_zero_gradient(path):
    args = problem(30, 20, 6, 3, device=DEVICE)
    _, _, dgate, ddown, dup, _ = run_triton(*args, "input")
    for gradient in (dgate, ddown, dup):
        assert not gradient[2].any()
        assert gradient[:2].any(-1).any(-1).all()


SUBSETS = [tuple(i == k for i in range(5)) for k in range(5)]
SUBSETS += [(False,) * 5, (True, True, False, False, False), (False, False, True, True, False)]


@pytest.mark.parametrize("needs", SUBSETS)
def test_only_needed_gradients_and_the_same_bits(needs):
    args = problem(25, 37, 9, 2, norm=True, device=DEVICE)
    _, *full = run_triton(*args, "norm")
    _, *some = run_triton(*args, "norm", needs=needs)
    for gradient, expected, needed in zip(some, full, needs, strict=True):
        assert torch.equal(gradient, expected) if needed else gradient.numel() == 0


def test_frozen_parts_launch_nothing(monkeypatch):
    launched = []
    for name in ("launch_backward", "launch_gate_down", "launch_up", "pack"):
        original = getattr(triton_backend, name)

        def spy(*args, name=name, original=original):
            launched.append(name)
            return original(*args)

        monkeypatch.setattr(triton_backend, name, spy)
    args = problem(20, 32, 16, device=DEVICE)
    run_triton(*args, "input", needs=(True, False, False, False, False))
    assert launched == ["launch_backward"]


@pytest.mark.parametrize("residual", ["input", "norm"])
def test_nan_stays_in_its_row(path, residual):
    x, gate, down, up, _, weight, dy = problem(30, 33, 7, 2, norm=True, device=DEVICE)
    expert = torch.arange(30, device=DEVICE).remainder(3).sub(1).int()
    x[13] = float("nan")
    args = (x, gate, down, up, expert, weight, dy)
    y, dx, *_ = run_triton(*args, residual)
    assert y[13].isnan().all() and dx[13].isnan().all()
    keep = torch.arange(30, device=DEVICE) != 13
    assert y[keep].isfinite().all() and dx[keep].isfinite().all()


def test_nan_without_expert_reaches_no_weight():
    x, gate, down, up, expert, _, dy = problem(40, 33, 7, 2, device=DEVICE)
    expert[:3] = -1
    x[1] = dy[2] = float("nan")
    _, _, dgate, ddown, dup, _ = run_triton(x, gate, down, up, expert, None, dy, "input")
    for gradient in (dgate, ddown, dup):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("value", [1e3, -1e3])
def test_large_preactivations_stay_finite(value):
    x, gate, down, up, _, _, dy = problem(20, 32, 16, device=DEVICE)
    gate[:] = value
    for ours in run_triton(x, gate, down, up, None, None, dy, "input"):
        assert ours.isfinite().all()


def test_outlier_channels_under_the_norm(assert_as_good_as_eager):
    args = list(problem(30, 64, 16, norm=True, dtypes=MIXED, device=DEVICE))
    args[0][:, 5] *= 1e3
    check_error_rule(assert_as_good_as_eager, args, "input")


def test_unsupported_names_the_constraint():
    x, gate, down, up, *_ = problem(4, 16, 8, device=DEVICE)
    double = [t.double() for t in (x, gate, down, up)]
    assert "float64" in triton_backend.unsupported(*double, None, None)
    wide = gate.new_empty(1, 257, 16)
    assert "257" in triton_backend.unsupported(x, wide, wide, up, None, None)
    assert triton_backend.unsupported(x, gate, down, up, None, None) is None
    other = "meta"
    assert other in triton_backend.unsupported(
        *(t.to(other) for t in (x, gate, down, up)), None, None
    )


VARIANTS = [  # experts, shared, norm, residual
    (1, False, False, "input"), (2, False, True, "norm"), (3, True, True, "input"),
    (1, False, True, "none"), (2, False, True, "input"), (2, True, False, "input"),
]  # fmt: skip
SIZES = [  # dim, rank
    (768, 16), (768, 64), (1152, 32), (1000, 20), (1024, 128), (2048, 64), (4096, 32), (4096, 64),
    (4096, 128), (4096, 256), (5120, 16), (33, 7),
]  # fmt: skip
BF16_MASTER = (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("tokens", [1, 199, 2048, 8192])
@pytest.mark.parametrize(
    ("case", "dtypes"),
    list(
        zip(
            [(*size, *VARIANTS[i % 6]) for i, size in enumerate(SIZES * 2)],
            [HALF] * 12 + [BF16_MASTER, MIXED, FP32] * 4,
            strict=True,
        )
    ),
    ids=str,
)
class TestOnGpu:
    pytestmark = needs_gpu

    def test_error_rule(self, assert_as_good_as_eager, tokens, case, dtypes):
        dim, rank, experts, shared, norm, residual = case
        args = problem(
            tokens, dim, rank, experts, shared=shared, norm=norm, dtypes=dtypes, device=DEVICE,
            runs=1 if tokens < 2048 else 32,
        )  # fmt: skip
        # Over millions of elements the largest error is a property of the draw; over one row's,
        # of the luck of eager's roundings.
        check_error_rule(assert_as_good_as_eager, args, residual, largest=False)


@pytest.mark.parametrize("path_name", PATHS)
@pytest.mark.parametrize("norm", [False, True])
class TestReruns:
    pytestmark = needs_gpu

    def test_ten_reruns_are_bit_equal(self, path_name, norm):
        config = {**PATHS[path_name], "BM": 64}
        parts = {f"swiglu_adapter.{part}": config for part in ("forward", "backward")}
        args = problem(4001, 1024, 32, 2, norm=norm, dtypes=HALF, device=DEVICE)
        with override(parts):
            first = run_triton(*args, "input")
            for _ in range(10):
                assert all(map(torch.equal, run_triton(*args, "input"), first))
