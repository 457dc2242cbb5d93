"""The weights' gradients in CUDA: plan and arguments anywhere, numbers on a Hopper GPU."""

import pytest
import torch

from mmadapt.ops._backends import load
from tests.ops.swiglu_cases import problem

backend = load("mmadapt.ops._backends.cuda.swiglu_adapter")
if isinstance(backend, str):
    pytest.skip(backend, allow_module_level=True)
weights = backend.cuda_weights

pytestmark = pytest.mark.usefixtures("poison_new_buffers")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HALF, MIXED = (BF16, BF16), (BF16, FP32)
SIZES = {
    "tokens": 10, "dim": 256, "rank": 32, "dz_experts": 1, "h_experts": 1, "dtype": 1,
    "weight_dtype": 1, "norm_dtype": 1, "x": 0, "dy": 0,
    "dz": 0, "h": 0, "expert": 0, "norm_weight": 0, "gate": 0, "down": 0, "sums": 0,
    "count_sums": 0, "parts": 0, "dgate": 16, "ddown": 0, "dup": 16, "dnorm": 0, "stream": 0,
}  # fmt: skip


def plan(*sizes):
    return weights._C.cuda.swiglu_adapter_weights_plan(*sizes)


@pytest.mark.parametrize("columns", [8, 32, 40, 64, 72, 128])
@pytest.mark.parametrize("dim", [8, 264, 768, 1152, 4096, 5120, 8192, 16384, 65536])
def test_a_plan_is_one_wave_where_the_columns_allow_it(dim, columns):
    for tokens in (1, 31, 200, 2048, 8192, 100_000):
        width, pairs, ups, splits, parts = plan(tokens, dim, columns, columns)
        assert width in (32, 64, 128) and width >= columns > width // 2 - 24
        assert ups * 256 >= dim > (ups - 1) * 256
        assert pairs * (128 if width == 128 else 256) >= dim
        assert splits == 1 or (pairs + ups) * splits <= 132
        assert 1 <= splits <= max(1, -(-tokens // 32) // 4)
        assert parts == splits * dim * 3 * columns


def test_a_plan_of_one_factor_splits_the_tokens_further():
    assert plan(8192, 4096, 64, 64)[1:4] == (16, 16, 4)
    assert plan(8192, 4096, 64, 0)[1:4] == (16, 0, 8)
    assert plan(8192, 4096, 0, 64)[1:4] == (0, 16, 8)
    assert plan(8192, 4096, 0, 64)[4] == 8 * 4096 * 64


def test_sizes_without_a_plan():
    for columns in ((136, 8), (8, 136), (0, 0)):
        assert plan(100, 256, *columns)[0] == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="launches on a GPU")
def test_a_launch_without_a_gpu_names_its_arguments():
    with pytest.raises(
        RuntimeError, match=r"CUDA error .*swiglu_adapter_weights_kernel with tokens=10, dim=256"
    ):
        weights._C.cuda.swiglu_adapter_weights(**SIZES)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"tokens": 0}, "tokens: out of range"),
        ({"dim": 100}, "dim: expected a multiple of 8"),
        ({"dim": 0}, "dim: "),
        ({"rank": 20}, "rank: expected a multiple of 8"),
        ({"rank": 136}, "1 to 128 columns"),
        ({"dz_experts": 5}, "1 to 128 columns"),
        ({"dz_experts": -1}, "1 to 128 columns"),
        ({"dtype": 0}, "dtype: expected bf16 or fp16"),
        ({"weight_dtype": 2}, "weight_dtype: expected dtype or fp32"),
        ({"norm_dtype": 2}, "norm_dtype: expected dtype or fp32"),
        ({"dgate": 0}, "dz_experts: goes with"),
        ({"dz_experts": 0}, "dz_experts: goes with"),
        ({"dup": 0}, "h_experts: goes with dup"),
        ({"h_experts": 0}, "h_experts: goes with dup"),
        ({"dnorm": 16}, "dnorm: needs norm_weight, gate and down"),
        ({"x": 8}, "addresses at multiples of 16"),
        ({"parts": 4}, "addresses at multiples of 16"),
    ],
)
def test_bad_arguments_are_named_before_the_launch(change, text):
    with pytest.raises(ValueError, match=text):
        weights._C.cuda.swiglu_adapter_weights(**SIZES | change)


def narrow(columns):
    return torch.empty(2, 5, columns), torch.empty(5, columns)


def test_what_is_left_to_triton_is_named():
    assert weights.unsupported(1, 1, 64, *narrow(64)) is None
    assert weights.unsupported(2, 2, 64, *narrow(128)) is None
    assert weights.unsupported(4, 1, 32, narrow(128)[0], narrow(32)[1]) is None
    assert weights.unsupported(4, 4, 32, torch.empty(0), torch.empty(0)) is None
    reason = weights.unsupported(4, 4, 64, *narrow(64))
    assert reason == "dz has 64 columns for 4 experts of rank 64"
    assert "h has 64" in weights.unsupported(4, 4, 64, torch.empty(0), narrow(64)[1])
    assert "at most 128" in weights.unsupported(1, 1, 136, *narrow(136))
    assert "multiple of 8" in weights.unsupported(1, 1, 20, *narrow(20))


@pytest.mark.parametrize(
    ("rank", "experts", "chosen"),
    [
        (32, 1, "cuda"), (32, 2, "cuda"), (64, 1, "cuda"), (32, 5, "triton"), (72, 1, "triton"),
        (64, 2, "triton"),
    ],
)  # fmt: skip
def test_the_kernel_is_chosen_by_what_it_supports_and_its_time(monkeypatch, rank, experts, chosen):
    called = []
    for name, module in (("cuda", weights), ("triton", backend.triton_backend)):
        monkeypatch.setattr(module, "weight_gradients", lambda *a, name=name: called.append(name))
    x, gate, down, up, expert, _, dy = problem(6, 64, rank, experts)
    needs = (True, True, True, True, False)
    dz, h = backend.triton_backend.for_weights(x, gate, up, None, needs)
    gradients = (x, gate, down, up, x)
    backend._weight_gradients(dy, x, gate, down, expert, None, x, "input", dz, h, gradients, needs)
    assert called == [chosen]


on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def gpu(*cases):
    return [pytest.param(*case, marks=on_gpu) for case in cases]


def factors(tokens, dim, rank, experts, ups, dtypes, runs=7):
    """x, dy, weights, ids, and dz and h with zeros outside a token's own expert."""
    dtype, weight_dtype = dtypes
    x, dy = (torch.randn(tokens, dim, device="cuda").to(dtype) for _ in range(2))
    gate, down = (torch.randn(experts, rank, dim, device="cuda").to(weight_dtype) for _ in "gd")
    up = torch.randn(ups, dim, rank, device="cuda").to(weight_dtype)
    ids = None
    if experts > 1:
        ids = torch.randint(-1, experts, (tokens // runs + 1,), device="cuda")
        ids = ids.repeat_interleave(runs)[:tokens].int()

    def spread(compact, count):
        if ids is None:
            return compact
        own = ids[:, None] == torch.arange(count, device="cuda")
        own = own if count > 1 else (ids >= 0)[:, None]
        return (compact[:, None] * own[..., None]).flatten(1)

    drawn = [torch.randn(tokens, rank, device="cuda").to(dtype) for _ in range(3)]
    dz = torch.stack([spread(drawn[0], experts), spread(drawn[1], experts)])
    return x, dy, gate, down, up, ids, dz, spread(drawn[2], ups)


def run(x, dy, gate, down, up, ids, dz, h, norm=None, residual="input", rstd=None):
    """dgate, ddown, dup, dnorm."""
    like = [x, gate, down, up, x.new_empty(0) if norm is None else norm]
    gradients = tuple(torch.full_like(t, float("nan")) for t in like)
    assert weights.unsupported(len(gate), len(up), gate.shape[1], dz, h) is None
    weights.weight_gradients(dy, x, gate, down, ids, norm, rstd, residual, dz, h, gradients)
    return gradients[1:]


def formula(dtype, x, dy, gate, down, up, ids, dz, h, norm=None, residual="input", rstd=None):
    x, dy, dz, h = (t.to(dtype) for t in (x, dy, dz, h))
    sums = [half.T @ x for half in dz]
    factor = 1 if norm is None else norm.to(dtype)
    ups, rank = len(up), up.shape[2]
    dup = (dy.T @ h).view(-1, ups, rank).transpose(0, 1)
    grads = [*((s * factor).view(gate.shape) for s in sums), dup]
    of_norm = torch.empty(0, device=x.device)
    if norm is not None:
        pairs = zip((gate, down), sums, strict=True)
        of_norm = sum((w.to(dtype).flatten(0, 1) * s).sum(0) for w, s in pairs)
        if residual == "norm":
            of_norm = of_norm + (dy * x * rstd.to(dtype)[:, None]).sum(0)
    types = [gate.dtype] * 3 + [x.dtype if norm is None else norm.dtype]
    return [
        g.to(t) if dtype != torch.float64 else g
        for g, t in zip([*grads, of_norm], types, strict=True)
    ]


@pytest.mark.parametrize(
    ("tokens", "dim", "rank", "experts", "ups", "dtypes"),
    gpu(
        (1, 8, 8, 1, 1, HALF),
        (33, 64, 32, 1, 1, HALF),
        (199, 136, 16, 1, 1, MIXED),
        (300, 1032, 64, 1, 1, (FP16, FP16)),
        (300, 264, 72, 1, 1, HALF),
        (500, 520, 128, 1, 1, (FP16, FP32)),
        (300, 264, 32, 2, 2, HALF),
        (300, 768, 24, 4, 1, MIXED),
        (1000, 264, 32, 4, 4, HALF),
        (8192, 4096, 32, 1, 1, HALF),
        (8192, 4096, 64, 1, 1, HALF),
        (8192, 4096, 128, 1, 1, MIXED),
        (40000, 1152, 32, 2, 2, HALF),
    ),
)
@pytest.mark.parametrize("residual", [None, "input", "norm"])
def test_error_rule(assert_as_good_as_eager, tokens, dim, rank, experts, ups, dtypes, residual):
    operands = factors(tokens, dim, rank, experts, ups, dtypes)
    norm = {}
    if residual is not None:
        weight = (0.5 + torch.rand(dim, device="cuda")).to(dtypes[1])
        rstd = 0.5 + torch.rand(tokens, device="cuda")
        norm = {"norm": weight, "residual": residual, "rstd": rstd}
    eager, exact = (formula(t, *operands, **norm) for t in (dtypes[0], torch.float64))
    for actual, same, true in zip(run(*operands, **norm), eager, exact, strict=True):
        assert_as_good_as_eager(actual, same, true, largest=tokens < 2048)


@pytest.mark.parametrize("runs", gpu((7,)))
def test_tokens_without_an_expert_count_for_the_norm_that_is_the_base(
    assert_as_good_as_eager, runs
):
    operands = factors(500, 264, 32, 2, 2, MIXED, runs=runs)
    x, dy, nobody = *operands[:2], operands[5] < 0
    rstd = 0.5 + torch.rand(500, device="cuda")
    norm = {"norm": 0.5 + torch.rand(264, device="cuda"), "residual": "norm", "rstd": rstd}
    eager, exact = (formula(t, *operands, **norm) for t in (BF16, torch.float64))
    of_nobody = (dy.double() * x.double() * rstd[:, None])[nobody].sum(0)
    assert of_nobody.norm() > 0.03 * exact[3].norm()  # would show if it were left out
    for rows in (operands[6].transpose(0, 1), operands[7]):
        rows[nobody] = float("nan")  # not looked at
    for actual, same, true in zip(run(*operands, **norm), eager, exact, strict=True):
        assert_as_good_as_eager(actual, same, true, largest=True)


@pytest.mark.parametrize("runs", gpu((1,), (40,)))
def test_ids_beyond_the_first_batches(assert_as_good_as_eager, runs):
    operands = factors(
        33_333, 4096, 32, 2, 2, MIXED, runs=runs
    )  # 260 tiles a block, the last short
    eager, exact = (formula(t, *operands) for t in (BF16, torch.float64))
    for actual, same, true in zip(run(*operands)[:3], eager[:3], exact[:3], strict=True):
        assert_as_good_as_eager(actual, same, true, largest=False)


@pytest.mark.parametrize("runs", gpu((1,), (40,), (200,)))
def test_rows_without_an_expert_are_not_looked_at(runs):
    operands = factors(1000, 264, 32, 2, 2, HALF, runs=runs)
    expected, nobody = run(*operands), operands[5] < 0
    assert nobody.any() and not nobody.all()
    for rows in (*operands[:2], operands[6].transpose(0, 1), operands[7]):
        rows[nobody] = float("nan")
    for actual, same in zip(run(*operands), expected, strict=True):
        assert torch.equal(actual, same)


@pytest.mark.parametrize("tokens", gpu((1,), (700,)))
def test_no_expert_at_all_gives_zeros(tokens):
    operands = list(factors(tokens, 264, 32, 2, 2, HALF))
    operands[5] = torch.full_like(operands[5], -1)
    assert all(not gradient.any() for gradient in run(*operands))


@pytest.mark.parametrize("needed", gpu((0,), (1,), (2,)))
def test_one_gradient_alone(needed):
    x, dy, gate, down, _, ids, dz, h = operands = factors(600, 520, 32, 1, 1, HALF)
    expected = run(*operands)[needed]
    gradients = [torch.empty(0, device="cuda") for _ in range(5)]
    gradients[1 + needed] = torch.full_like(expected, float("nan"))
    absent = torch.empty(0, device="cuda")
    left = (absent, h) if needed == 2 else (dz, absent)
    weights.weight_gradients(dy, x, gate, down, ids, None, absent, "input", *left, tuple(gradients))
    # Without the other factor the tokens are split further.
    torch.testing.assert_close(gradients[1 + needed], expected, rtol=2**-6, atol=2**-3)


@pytest.mark.parametrize("rank", gpu((32,), (64,)))
def test_reruns_are_bit_equal(rank):
    operands = factors(4001, 2048, rank, 2, 2, MIXED, runs=40)
    first = run(*operands)
    for _ in range(10):
        assert all(map(torch.equal, run(*operands), first))


@pytest.mark.parametrize("rank", gpu((32,)))
def test_in_a_cuda_graph(rank):
    operands = factors(1000, 520, rank, 1, 1, HALF)
    expected = run(*operands)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*operands)
    for _ in range(3):
        for gradient in captured[:3]:
            gradient.zero_()
        graph.replay()
        assert all(map(torch.equal, captured[:3], expected[:3]))
