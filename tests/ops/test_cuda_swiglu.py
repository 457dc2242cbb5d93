"""The CUDA backend of swiglu_adapter: its choices anywhere, the numbers of both paths on a GPU."""

import functools
from types import SimpleNamespace

import pytest
import torch

from mmadapt.ops._backends import load
from tests.ops.swiglu_cases import problem, run, run_exact, run_formula

backend = load("mmadapt.ops._backends.cuda.swiglu_adapter")
if isinstance(backend, str):
    pytest.skip(backend, allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poison_new_buffers")

HALF, FLOAT16 = (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)
MIXED = (torch.bfloat16, torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="launches on a GPU")
def test_a_launch_without_a_gpu_names_its_arguments():
    sizes = (10, 256, 32, 1, 1, 1, 1, 1, 1, 1.0, 0.0, 0, 0)
    with pytest.raises(
        RuntimeError, match=r"CUDA error .*swiglu_adapter_kernel with tokens=10, dim=256"
    ):
        backend._C.cuda.swiglu_adapter_forward(*sizes, *[0] * 8, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("index", "value", "text"),
    [
        (0, 0, "tokens: out of range"),
        (1, 100, "dim: expected a multiple of 8"),
        (2, 136, "rank: "),
        (4, 3, "up_experts: "),
        (5, 0, "dtype: expected bf16 or fp16"),
        (6, 2, "weight_dtype: expected dtype or fp32"),
        (7, 2, "norm_dtype: expected dtype or fp32"),
        (8, 3, "residual: out of range"),
        (8, 2, "norm_weight: absent"),
        (1, 8200, "dim: expected a multiple of 8, at most 8192"),
        (11, 1, "cluster: "),
        (11, 3, "cluster: "),
        (11, 16, "cluster: "),
        (12, 96, "rows: "),
        (3, 2**15 + 1, "experts: expected at most 32768"),
        (6, 0, "packed: expected memory for packed weights"),
    ],
)
def test_bad_arguments_are_named_before_the_launch(index, value, text):
    sizes = [10, 256, 32, 1, 1, 1, 1, 1, 1, 1.0, 0.0, 0, 0]
    sizes[index] = value
    with pytest.raises(ValueError, match=text):
        backend._C.cuda.swiglu_adapter_forward(*sizes, *[0] * 8, 0, 0, 0, 0)


def test_addresses_and_missing_ids_are_named_before_the_launch():
    sizes = [10, 256, 32, 1, 1, 1, 1, 1, 1, 1.0, 0.0, 0, 0]
    with pytest.raises(ValueError, match="addresses at multiples of 16"):
        backend._C.cuda.swiglu_adapter_forward(*sizes, 8, *[0] * 7, 0, 0, 0, 0)
    sizes[3:5] = [2, 2]
    with pytest.raises(ValueError, match="expert: absent"):
        backend._C.cuda.swiglu_adapter_forward(*sizes, *[0] * 8, 0, 0, 0, 0)


on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(params=["hopper", "portable"])
def served(request):
    """The backend with one of its two sets of kernels."""
    if request.param == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    return SimpleNamespace(
        forward=functools.partial(backend.forward, path=request.param),
        backward=functools.partial(backend.backward, path=request.param),
    )


def assert_close_in_norm(actual, expected):
    assert (actual.double() - expected.double()).norm() <= 2**-7 * expected.double().norm()


def gpu(*cases):
    return [pytest.param(*case, marks=on_gpu) for case in cases]


@pytest.mark.parametrize(
    ("tokens", "dim", "rank", "experts", "shared", "norm", "residual", "dtypes"),
    gpu(
        (1, 64, 32, 1, False, False, "input", HALF),
        (199, 136, 16, 1, False, True, "norm", HALF),
        (300, 1032, 64, 1, False, True, "input", MIXED),
        (300, 768, 8, 2, False, False, "input", HALF),
        (300, 768, 32, 3, True, True, "norm", MIXED),
        (300, 512, 64, 2, False, True, "none", FLOAT16),
        (300, 512, 128, 1, False, False, "none", HALF),
        (300, 512, 128, 2, False, True, "norm", MIXED),
        (8192, 1152, 32, 1, False, False, "input", HALF),
        (2048, 4096, 32, 2, False, True, "norm", HALF),
        (2048, 4096, 64, 1, False, True, "input", MIXED),
        (4100, 2048, 64, 1, False, False, "input", FLOAT16),
        (1000, 8192, 32, 1, False, False, "input", HALF),
    ),
)
def test_error_rule(
    served, assert_as_good_as_eager, tokens, dim, rank, experts, shared, norm, residual, dtypes
):
    args = problem(
        tokens, dim, rank, experts, shared=shared, norm=norm, dtypes=dtypes, device="cuda", runs=7
    )
    assert backend.unsupported(*args[:6]) is None
    ours, eager = run(served, *args, residual), run_formula(args[0].dtype, *args, residual)
    for actual, same, exact in zip(ours, eager, run_exact(*args, residual), strict=True):
        assert_as_good_as_eager(actual, same, exact)


@pytest.mark.parametrize(
    ("experts", "rank", "shared", "runs", "norm"),
    gpu(
        (4, 24, False, 1, True),
        (5, 8, True, 1, False),
        (3, 40, False, 20, True),
        (4, 32, True, 9, True),
    ),
)
def test_tiles_of_many_experts(served, assert_as_good_as_eager, experts, rank, shared, runs, norm):
    args = problem(
        300, 256, rank, experts, shared=shared, norm=norm, dtypes=HALF, device="cuda", runs=runs,
        busy=experts,
    )  # fmt: skip
    assert backend.unsupported(*args[:6]) is None
    ours, eager = run(served, *args, "input"), run_formula(args[0].dtype, *args, "input")
    for actual, same, exact in zip(ours, eager, run_exact(*args, "input"), strict=True):
        assert_as_good_as_eager(actual, same, exact)


@pytest.mark.parametrize("place", gpu((0,), (1,), (3,), (5,), (6,)))
def test_views_that_start_anywhere(served, place):
    args = list(problem(70, 256, 32, norm=True, dtypes=HALF, device="cuda"))
    expected = run(served, *args, "norm")
    whole = args[place].new_empty(args[place].numel() + 1)
    whole[1:] = args[place].flatten()
    args[place] = whole[1:].view(args[place].shape)
    assert args[place].data_ptr() % 16 != 0
    for actual, same in zip(run(served, *args, "norm"), expected, strict=True):
        assert torch.equal(actual, same)


@pytest.mark.parametrize("rows", gpu((64,), (128,), (256,)))
@pytest.mark.parametrize("cluster", [2, 4, 8])
@pytest.mark.parametrize("rank", [32, 64])
def test_any_tile_gives_the_same_result(rank, cluster, rows, monkeypatch):
    args = problem(300, 512, rank, 2, norm=True, dtypes=HALF, device="cuda", runs=20)
    expected = run(backend, *args, "input")
    monkeypatch.setattr(
        backend, "_problem", functools.partial(backend._problem, cluster=cluster, rows=rows)
    )
    try:
        results = run(backend, *args, "input")
    except ValueError as error:
        assert "no such tile, or it does not fit" in str(error)
        assert (rank, rows) == (64, 256)  # from 64 ranks on two warpgroups share a row group
        return
    for actual, same in zip(results, expected, strict=True):
        assert_close_in_norm(actual, same)


@pytest.mark.parametrize("norm", gpu((False,), (True,)))
def test_reruns_are_bit_equal(served, norm):
    args = problem(3000, 2048, 32, 2, norm=norm, dtypes=HALF, device="cuda", runs=40)
    first = run(served, *args, "input")
    for _ in range(10):
        again = run(served, *args, "input")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("shared", gpu((False,), (True,)))
def test_tokens_without_expert_are_the_base_bitwise(served, shared):
    x, gate, down, up, _, _, dy = problem(70, 256, 8, 2, shared=shared, dtypes=HALF, device="cuda")
    gate[0, 0, 0] = down[1, 0, 0] = up[0, 0, 0] = float("inf")  # weights nobody asked for
    nobody = torch.full((70,), -1, dtype=torch.int32, device="cuda")
    y, dx, *grads = run(served, x, gate, down, up, nobody, None, dy, "input")
    assert torch.equal(y, x) and torch.equal(dx, dy)
    assert all(not g.any() for g in grads)


@pytest.mark.parametrize(
    "needs", gpu(((True, False, False, False, False),), ((False,) + (True,) * 4,))
)
def test_only_what_is_needed(served, needs):
    args = problem(100, 256, 32, 2, norm=True, dtypes=HALF, device="cuda")
    full, part = run(served, *args, "norm"), run(served, *args, "norm", needs=needs)
    for wanted, ours, whole in zip(needs, part[1:], full[1:], strict=True):
        assert (ours.numel() > 0) == wanted
        if wanted:  # without dx another kernel leaves dz behind, rounded elsewhere
            assert_close_in_norm(ours, whole)


# The portable kernels alone


def portable_arguments(**changed):
    """Of swiglu_adapter_portable_forward, with addresses that are never reached."""
    arguments = {
        "tokens": 10, "dim": 256, "rank": 32, "experts": 1, "up_experts": 1, "dtype": 1,
        "weight_dtype": 1, "norm_dtype": 1, "residual": 1, "scale": 1.0, "eps": 0.0, "stages": 0,
        "x": 0, "gate": 0, "down": 0, "up": 0, "expert": 0, "norm_weight": 0, "workspace": 0,
        "stream": 0, "y": 0, "zg": 0, "zd": 0, "rstd": 0,
    }  # fmt: skip
    assert changed.keys() <= arguments.keys()
    return arguments | changed


@pytest.mark.skipif(torch.cuda.is_available(), reason="launches on a GPU")
@pytest.mark.parametrize(
    ("changed", "kernel"),
    [
        ({}, "swiglu_adapter_portable_kernel"),
        ({"norm_weight": 16, "workspace": 16}, "pack_weights_kernel"),
    ],
)
def test_a_portable_launch_without_a_gpu_names_its_arguments(changed, kernel):
    with pytest.raises(RuntimeError, match=rf"CUDA error .*{kernel} with tokens=10, dim=256"):
        backend._C.cuda.swiglu_adapter_portable_forward(**portable_arguments(**changed))


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"tokens": 0}, "tokens: out of range"),
        ({"dim": 100}, "dim: expected a multiple of 8"),
        ({"rank": 136}, "rank: "),
        ({"up_experts": 3}, "up_experts: "),
        ({"dtype": 0}, "dtype: expected bf16 or fp16"),
        ({"weight_dtype": 2}, "weight_dtype: expected dtype or fp32"),
        ({"norm_dtype": 2}, "norm_dtype: expected dtype or fp32"),
        ({"residual": 3}, "residual: out of range"),
        ({"residual": 2}, "norm_weight: absent"),
        ({"stages": 9}, "stages: expected 0 or 2 to 8"),
        ({"x": 8}, "addresses at multiples of 16"),
        ({"y": 8}, "y: expected an address at a multiple of 16"),
        ({"experts": 2, "up_experts": 2}, "expert: absent"),
        ({"weight_dtype": 0}, "workspace: expected memory"),
        ({"norm_weight": 16}, "workspace: expected memory"),
    ],
)
def test_bad_arguments_of_the_portable_kernels_are_named(changed, text):
    with pytest.raises(ValueError, match=text):
        backend._C.cuda.swiglu_adapter_portable_forward(**portable_arguments(**changed))


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ((10, 100, 32), "dim 100 is not a multiple of 8"),
        ((10, 64, 12), "rank 12 is not a multiple of 8"),
        ((10, 64, 136), "rank 136 is larger than 128"),
        ((2**31, 64, 32), "rows, too many"),
        ((10, 8, 8), None),
    ],
)
def test_sizes_of_the_portable_kernels(sizes, text):
    reason = backend.portable.unsupported_sizes(*sizes)
    assert (reason is None) if text is None else (text in reason)


@pytest.mark.parametrize(
    ("no_hopper", "experts", "dim", "path"),
    [
        (None, 1, 8192, "hopper"),
        (None, 1, 8200, "portable"),  # wider than the Hopper kernels take
        (None, 2**15, 8, "hopper"),
        (None, 2**15 + 1, 8, "portable"),
        ("compute capability 8.0, needs 9.0", 1, 4096, "portable"),
    ],
)
def test_hopper_kernels_serve_what_they_can(monkeypatch, no_hopper, experts, dim, path):
    monkeypatch.setattr(backend, "unsupported_device", lambda *args, **settings: no_hopper)
    assert backend.kernels(torch.empty(1, dim), torch.empty(experts, 1, dim)) == path


@pytest.mark.parametrize("rank", [32, 64, 128])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_hopper_kernels_have_a_plan(rank, norm, backward):
    for dim in (8, 64, 136, 768, 1032, 2048, 4096, 5120, 8192):
        for cluster in (2, 4):
            for rows in (64, 128, 256) if rank < 64 else (64, 128):
                stages, weight_stages, shared = backend._C.cuda.swiglu_adapter_plan(
                    dim, rank, norm, backward, cluster, rows
                )
                assert min(stages, weight_stages) >= 1
                assert shared <= 232448  # bytes of shared memory that a block of sm_90 may have


def test_a_tile_that_does_not_fit_has_no_plan():
    for rank, cluster, rows in ((64, 2, 256), (128, 2, 256), (32, 1, 64)):
        plan = backend._C.cuda.swiglu_adapter_plan(4096, rank, False, False, cluster, rows)
        assert plan == (0, 0, 0)


@pytest.mark.parametrize("stages", gpu((2,), (3,), (4,), (7,)))
def test_any_number_of_buffers_gives_the_same_bits(stages, monkeypatch):
    args = problem(300, 520, 32, 2, norm=True, dtypes=HALF, device="cuda", runs=7)
    portable = SimpleNamespace(
        forward=functools.partial(backend.forward, path="portable"),
        backward=functools.partial(backend.backward, path="portable"),
    )
    expected = run(portable, *args, "norm")
    problem_of = functools.partial(backend.portable._problem, stages=stages)
    monkeypatch.setattr(backend.portable, "_problem", problem_of)
    for actual, same in zip(run(portable, *args, "norm"), expected, strict=True):
        assert torch.equal(actual, same)
