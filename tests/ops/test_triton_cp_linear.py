"""The Triton backend of cp_linear: error rule, dropout masks, every path, frozen subsets."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

import triton

from mmadapt.kernels.cp_linear import reference
from mmadapt.kernels.cp_linear.triton_project import cores
from mmadapt.ops._backends.triton import cp_linear as backend
from mmadapt.ops._backends.triton._configs import override
from tests.ops.cp_linear_cases import DEVICE, Case

pytestmark = pytest.mark.usefixtures("poison_new_buffers")

ON_GPU = torch.cuda.is_available()
TILE = {"bm": 32, "bn": 32, "bk": 16, "group": 2, "warps": 4, "stages": 2}
if ON_GPU:
    TILE |= {"bm": 64, "bn": 64, "bk": 32}


def path(number, *, tma=1, **tile):
    """Settings that force one way to y, with tiles small enough for several per case."""
    tile = {**TILE, "tma": tma, **tile}
    return {
        "cp_linear.path": {"path": number, "gemm_first": 0, "overlap": 0},
        "cp_linear.path_backward": {"path": min(number, 1), "gemm_first": 0},
        "cp_linear.fused": tile,
        "cp_linear.fused_backward": tile,
        "cp_linear.owner": tile | {"cols": 2},
    }


PATHS = {
    "cublas": path(0),
    "gemm first": {
        "cp_linear.path": {"path": 0, "gemm_first": 1, "overlap": 0},
        "cp_linear.path_backward": {"path": 0, "gemm_first": 1},
    },
    "fused": path(1),
    "fused by pointers": path(1, tma=0),
    "persistent": path(1, persistent=1, halves=1),
    "owner": path(2),
    "owner by pointers": path(2, tma=0),
}


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_path_obeys_the_error_rule(assert_as_good_as_eager, name, dtype):
    if name == "persistent" and not ON_GPU and triton.__version__ < "3.9":
        pytest.skip("the interpreter of older releases cannot loop to a runtime bound")
    torch.manual_seed(1)
    with override(PATHS[name]):
        Case(tokens=50, dims=(40, 48, 12), dtype=dtype).check(
            assert_as_good_as_eager, "triton", scale=0.7
        )


@pytest.mark.parametrize("tokens", [1, 33, 130])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "parameter_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_error_rule(assert_as_good_as_eager, tokens, count, dtype, parameter_dtype):
    if tokens == 1 and dtype != torch.float32:
        pytest.skip("a single row is the luck of eager's roundings")
    dense = (False, True, True) if tokens != 33 else (True, False)
    case = Case(tokens, (40, 24, 20), count, dense, dtype, parameter_dtype)
    case.check(assert_as_good_as_eager, "triton", scale=0.7)


@pytest.mark.parametrize("dims", [(7, 5, 1), (33, 17, 3), (66, 35, 40)])
@pytest.mark.parametrize("name", ["cublas", "fused", "owner"])
def test_odd_dimensions(dims, name):
    case = Case(35, dims, dense=(True,))
    with override(PATHS[name]):
        ours = case.run("triton")
    for a, b in zip(ours, case.run("reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["cublas", "fused", "owner"])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dropout_at", ["after", "before"])
def test_dropout_equals_the_reference_backend(name, dense, dropout_at):
    case = Case(40, (32, 24, 12), 1 if name == "owner" else 2, (dense, not dense))
    settings = {"scale": 0.7, "dropout": 0.4, "dropout_at": dropout_at}
    with override(PATHS[name]):
        ours = case.run("triton", **settings)
    for a, b in zip(ours, case.run("reference", **settings), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.999])
def test_dropout_masks_are_those_of_the_formula_bit_for_bit(dropout):
    tokens, rank = 70, 24
    z = torch.ones(tokens, rank, device=DEVICE)
    for seed in (0, 1, 2**62 - 1, 123456789012345678):
        seeds = torch.tensor([seed], device=DEVICE)
        core = torch.full((1, tokens, 32), float("nan"), device=DEVICE)
        modes = [torch.ones(rank, device=DEVICE)]
        threshold = round(dropout * (1 << 24))
        cores(modes, seeds, z, core, scale=1.0, threshold=threshold, kept=1.0, dropout="after")
        keep = reference.keep_mask(seeds[0], tokens, rank, dropout)
        assert torch.equal(core[0, :, :rank] == 1.0, keep)
        assert torch.equal(core[0, :, :rank] == 0.0, ~keep)


@pytest.mark.parametrize("split", [2, 4])
def test_splits_of_the_projection(assert_as_good_as_eager, split):
    tile = {"bm": 16, "bk": 16, "split": split}
    with override({"cp_linear.project": tile, "cp_linear.core_gradient": tile}):
        Case(21, (120, 100, 12), 2, (True, False)).check(
            assert_as_good_as_eager, "triton", scale=0.7
        )


def test_no_tokens():
    case = Case(tokens=0, count=2, dense=(False, True))
    *grads, _ = case.run("triton")
    ys, grads = grads[:2], grads[2:]
    assert all(y.shape == (0, 48) for y in ys)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=5)))
def test_every_subset_of_frozen_operands(needs):
    of_x, of_in, of_out, of_mode, of_bias = needs
    case = Case(20, (24, 16, 4), 2, (True, False))
    mask = [of_x, of_in, of_out, of_mode, False, of_bias, False]
    for a, b in zip(case.run("triton", mask), case.run("reference", mask), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def test_frozen_parts_launch_nothing(monkeypatch):
    launched = []
    for module, names in (
        (backend, ["cores"]),
        (backend.grad, ["core_gradient", "factor_partials", "reduce"]),
    ):
        for name in names:
            monkeypatch.setattr(module, name, lambda *_, name=name, **__: launched.append(name))
    monkeypatch.setattr(backend, "accumulate", lambda *_: launched.append("dx"))
    case = Case(20, (24, 16, 4))
    args = ([case.x], case.weights, case.biases, case.factor_in, case.factor_out, case.modes)
    z = torch.zeros(20, 4, device=DEVICE)

    def backward(needs, mode=False, bias=False):
        launched.clear()
        settings = (None, 1.0, 0.0, "after", needs, (mode,), (bias,))
        backend.backward(case.dys, args[0][0], *args[1:], z, *settings)
        return launched

    assert backward((False, False, False)) == []
    assert backward((False, False, False), bias=True) == []
    assert backward((False, False, True)) == ["cores", "factor_partials", "reduce"]
    assert backward((True, False, False)) == ["core_gradient", "dx"]
    assert backward((False, False, False), mode=True) == ["core_gradient"]


def test_what_is_not_supported():
    case = Case(2, (8, 8, 129))
    args = (case.x, case.weights, case.biases, case.factor_in, case.factor_out, case.modes)
    assert "R=129 > 128" in backend.unsupported(*args)
    wide = Case(2, (8, 8, 65), dense=(True,))
    args = (wide.x, wide.weights, wide.biases, wide.factor_in, wide.factor_out, wide.modes)
    assert "mode matrix of R=65" in backend.unsupported(*args)
    assert "float64" in backend.unsupported(case.x.double()[:, :8], *_small(case))


def _small(case):
    return case.weights, case.biases, case.factor_in[:4], case.factor_out[:, :4], case.modes


def test_path_without_a_measurement():
    assert backend.choose_path(16384, 768, 768, 64, 1, torch.bfloat16) == "fused"
    assert backend.choose_path(8192, 4096, 4096, 64, 3, torch.bfloat16) == "cublas"
    assert backend.choose_path(512, 768, 768, 64, 1, torch.bfloat16) == "cublas"
    assert backend.choose_path(16384, 768, 768, 64, 1, torch.float32) == "cublas"
    assert backend.choose_path(16384, 769, 768, 64, 1, torch.bfloat16) == "cublas"


def test_settings_worth_trying_are_complete():
    for name, space in backend.SPACES.items():
        assert 0 < len(space) <= 12, name
        assert len({tuple(sorted(config.items())) for config in space}) == len(space), name


def test_tuner_runs_every_kernel_on_its_path():
    found = {
        name: run for name, _, _, run in backend.tuning_targets((20, 16, 4), torch.float32, DEVICE)
    }
    assert found.keys() == backend.SPACES.keys()
    with override({**PATHS["owner"], "cp_linear.path": {"path": 0}}):
        y, z = found["cp_linear.owner"]()
        assert torch.isfinite(y).all() and torch.isfinite(z).all()
        assert len(found["cp_linear.fused_backward"]()) == 4


gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")


@gpu
@needs_gpu
@pytest.mark.parametrize("forced", ["default", "fused", "owner", "cublas"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dims", [(768, 768, 64), (1152, 4304, 16), (1001, 515, 100)])
def test_larger_shapes_on_a_gpu(assert_as_good_as_eager, forced, count, dense, dims):
    number = {"cublas": 0, "fused": 1, "owner": 2}.get(forced)
    forced = {} if number is None else {"cp_linear.path": {"path": number}}
    if number is not None:
        forced["cp_linear.path_backward"] = {"path": min(number, 1)}
    with override(forced):
        case = Case(2177, dims, count, (dense,), torch.bfloat16, torch.float32)
        case.check(assert_as_good_as_eager, "triton", scale=0.7)
        case.check(assert_as_good_as_eager, "triton", dropout=0.3, dropout_at="before")


@gpu
@needs_gpu
@pytest.mark.parametrize("name", ["cp_linear.fused", "cp_linear.owner", "cp_linear.project",
                                  "cp_linear.core_gradient", "cp_linear.factor_gradient",
                                  "cp_linear.fused_backward"])  # fmt: skip
def test_all_settings_worth_trying_on_a_gpu(assert_as_good_as_eager, name):
    number = 2 if name == "cp_linear.owner" else 1
    case = Case(3000, (768, 768, 64), 1, (False,), torch.bfloat16)
    for config in backend.SPACES[name]:
        if config.get("specialize"):  # the compiler's own bugs: see bench/sweeps/cp_linear.py
            continue
        paths = {"cp_linear.path": {"path": number}, "cp_linear.path_backward": {"path": 1}}
        with override({**paths, name: config}):
            case.check(assert_as_good_as_eager, "triton", scale=0.7)


@gpu
@needs_gpu
@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("overlap", [0, 1])
def test_graph_capture_and_bit_equal_reruns_on_a_gpu(number, overlap):
    forced = {
        "cp_linear.path": {"path": number, "overlap": overlap},
        "cp_linear.path_backward": {"path": min(number, 1)},
    }
    case = Case(4096, (768, 768, 64), 1, (True,), torch.bfloat16)
    seeds = torch.randint(2**62, (1,), device=DEVICE)
    shared = (case.weights, case.biases, case.factor_in, case.factor_out, case.modes)

    def step():
        ys, z = backend.forward(case.x, *shared, seeds, 0.7, 0.2, "after")
        grads = backend.backward(
            case.dys, case.x, *shared, z, seeds, 0.7, 0.2, "after", (True,) * 3, (True,), (True,)
        )
        flat = [*grads[:3], *grads[3], *grads[4]]
        return [*ys, z, *flat]

    with override(forced):
        first, reruns = step(), []
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(10):
                reruns.append(step())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for rerun in reruns:
            assert all(torch.equal(a, b) for a, b in zip(first, rerun, strict=True))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        case.x.copy_(torch.randn_like(case.x))
        expected = step()
        for _ in range(3):
            graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(expected, captured, strict=True))
