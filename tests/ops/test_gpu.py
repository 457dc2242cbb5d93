"""The contracts on a GPU, as users call them: what is chosen, agreement, graphs, streams, reruns.

One size for nearly all tests, since every size compiles kernels of its own.
"""

import pytest
import torch
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from mmadapt import nn
from mmadapt.ops import (
    BackendError,
    backends,
    cp_linear,
    explain,
    modality_gate,
    projected_modality_gate,
    swiglu_adapter,
)
from mmadapt.ops._backends import load
from tests.ops.test_registration import CASES

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# tokens, dim, rank, heads. From 8192 tokens on Triton is chosen for every contract.
SMALL, USUAL = (33, 12, 5, 3), (8192, 256, 16, 4)
BF16 = torch.bfloat16
OPS = {
    "swiglu_adapter": swiglu_adapter,
    "cp_linear": cp_linear,
    "modality_gate": modality_gate,
    "projected_modality_gate": projected_modality_gate,
}
by_name = pytest.mark.parametrize("name", OPS)
# What is chosen by itself, and the CUDA backend where a contract has one.
automatic_and_cuda = pytest.mark.parametrize("backend", [None, "cuda"])


class Case:
    """Operands of one contract, the same numbers on every device; calling it calls the operator.

    `tensors`: the floating operands, leaves. `routing`: expert ids or mask, None for cp_linear.
    """

    def __init__(
        self, name, device=DEVICE, dtype=BF16, size=USUAL, backend=None, dropout=0.0, seed=0
    ):
        torch.manual_seed(seed)
        tokens, dim, rank, heads = size
        self.name, self.backend, self.dropout = name, backend, dropout
        shapes = {
            "swiglu_adapter": [(2, rank, dim), (2, rank, dim), (2, dim, rank), (dim,)],
            "cp_linear": [(rank, dim), (dim, rank), (rank, rank)],
            "modality_gate": [(heads,)],
            "projected_modality_gate": [(heads, dim)],
        }[name]

        def draw(*shape):
            drawn = torch.randn(shape, dtype=torch.float64) / shape[-1] ** 0.5
            return drawn.to(device, dtype)

        x = torch.randn(tokens, dim, dtype=torch.float64).to(device, dtype)
        self.tensors = [t.requires_grad_() for t in (x, *(draw(*s) for s in shapes))]
        self.weight = draw(dim, dim)
        self.routing = self.draw_routing(tokens).to(device)
        if backend == "cuda":
            try:
                self.explain(backend=backend)
            except BackendError as error:  # not every contract has one
                pytest.skip(str(error))

    def draw_routing(self, tokens):
        """Runs of 11 tokens."""
        least, runs = (-1 if self.name == "swiglu_adapter" else 0), tokens // 11 + 1
        routing = torch.randint(least, 2, (runs,)).repeat_interleave(11)[:tokens]
        return routing if least < 0 else routing.bool()

    def redraw(self):
        """Other numbers in the same memory."""
        with torch.no_grad():
            for tensor in self.tensors:
                tensor.copy_(torch.randn_like(tensor) / tensor.shape[-1] ** 0.5)
        self.routing.copy_(self.draw_routing(self.routing.shape[0]))

    def arguments(self, x, *rest):
        if self.name == "swiglu_adapter":
            gate, down, up, norm = rest
            routed = {"expert": self.routing, "norm": (norm, 1e-5), "residual": "norm"}
            return (x, gate, down, up), routed
        if self.name == "cp_linear":
            return (x, self.weight, None, *rest), {"dropout": self.dropout}
        hidden = () if self.name == "modality_gate" else (x,)
        return (x, *hidden, *rest, self.routing), {}

    def __call__(self, *tensors):
        args, settings = self.arguments(*tensors)
        return OPS[self.name](*args, **settings, backend=self.backend)

    def explain(self, **settings):
        args, more = self.arguments(*self.tensors)
        return explain(self.name, *args, **more, **settings).backend


def value_and_grads(function, tensors):
    y = function(*tensors)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), tensors)]


def run(case):
    return value_and_grads(case, case.tensors)


def equal(results, expected):
    return all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def relative(actual, expected):
    return (actual.double() - expected.double()).norm() / expected.double().norm()


@by_name
def test_triton_is_chosen_for_usual_calls(name):
    case = Case(name)
    assert case.explain() == "triton"
    assert case.explain(backend="triton") == "triton"
    assert Case(name, dtype=torch.float32, size=SMALL).explain(backend="triton") == "triton"
    assert Case(name, dtype=torch.float64, size=SMALL).explain() == "reference"


@by_name
def test_fp64_equals_the_cpu(name):
    cases = [Case(name, device, torch.float64, SMALL, dropout=0.3) for device in ("cpu", DEVICE)]
    with pytest.MonkeyPatch.context() as patch:
        # Seeds from one generator for both devices: masks are a function of the seed alone.
        patch.setattr(torch, "randint", lambda high, size, **kw: torch.full(size, 7, **kw))
        expected, actual = map(run, cases)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@by_name
def test_bf16_is_as_near_to_fp64_as_the_reference(name, backend):
    """Automatic and explicit choice give the same bits, for fp32 sums no worse than eager's."""
    ours = run(Case(name, backend=backend))
    exact = run(Case(name, "cpu", torch.float64))
    reference = run(Case(name, backend="reference"))
    if Case(name).explain() == backend:
        assert equal(ours, run(Case(name)))
    for actual, eager, true in zip(ours, reference, exact, strict=True):
        # The operands were rounded to bf16 themselves: 2^-9 of each.
        assert relative(actual.cpu(), true) <= 2 * relative(eager.cpu(), true) + 2**-8


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("name", CASES)
def test_opcheck(name, backend):
    operator, arguments = CASES[name]()
    contract = operator.name().removeprefix("mmadapt::").rpartition("_")[0]
    if (reason := backends(contract).get(backend, "there is none")) is not None:
        pytest.skip(f"backend {backend} of {contract}: {reason}")

    def move(t):
        # A full mask: what belongs to other rows may stay unwritten where nobody reads it.
        return torch.ones_like(t, device=DEVICE) if t.dtype == torch.bool else t.to(DEVICE)

    *arguments, automatic = tree_map_only(torch.Tensor, move, arguments)
    assert automatic is None
    try:
        operator(*arguments, backend)
    except BackendError as error:  # a shape that it does not serve
        pytest.skip(str(error))
    torch.library.opcheck(operator, (*arguments, backend))


@automatic_and_cuda
@by_name
def test_compiled_equals_eager(name, backend):
    case = Case(name, backend=backend)
    torch._dynamo.reset()
    dy = torch.randn_like(case.tensors[0])
    results = []
    for function in (case, torch.compile(lambda *t: case(*t), fullgraph=True)):
        y = function(*case.tensors)
        results.append([y.detach(), *torch.autograd.grad(y, case.tensors, dy)])
    for compiled, eager in zip(*reversed(results), strict=True):
        assert compiled.dtype == eager.dtype
        assert relative(compiled, eager) <= 2**-8


@pytest.mark.parametrize(("dtype", "backend"), [(BF16, None), (BF16, "triton"),
                                                (BF16, "cuda"), (torch.float32, "triton"),
                                                (torch.float32, "reference")])  # fmt: skip
@by_name
def test_no_call_waits_for_the_device(name, dtype, backend):
    case = Case(name, dtype=dtype, backend=backend, dropout=0.3)
    run(case)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(case)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def capture(case):
    """A graph of forward and backward, and the tensors it writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(case)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(case)
    return graph, captured


@pytest.mark.parametrize("backend", ["triton", "cuda", "reference"])
@by_name
def test_a_graph_follows_its_inputs(name, backend):
    """Activations, weights, masks and expert ids may change between replays."""
    case = Case(name, backend=backend)
    graph, captured = capture(case)
    for _ in range(3):
        case.redraw()
        graph.replay()
        for replayed, eager in zip(captured, run(case), strict=True):
            if backend != "reference":
                assert torch.equal(replayed, eager)
            else:  # cuBLAS may choose otherwise in a graph
                assert relative(replayed, eager) <= 2**-8


def test_replays_draw_other_dropout_masks():
    graph, (y, *_) = capture(Case("cp_linear", dropout=0.5))
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append(y.clone())
    assert all(y.isfinite().all() for y in replays)
    assert not torch.equal(*replays)


@automatic_and_cuda
@by_name
def test_two_streams_at_once(name, backend):
    cases = [Case(name, backend=backend, seed=seed) for seed in (1, 2)]
    expected = [run(case) for case in cases]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    for _ in range(5):
        results = []
        for stream, case in zip(streams, cases, strict=True):
            with torch.cuda.stream(stream):
                results.append(run(case))
        torch.cuda.synchronize()
        assert all(map(equal, results, expected))


@automatic_and_cuda
@by_name
def test_checkpointed_equals_plain(name, backend):
    """Dropout masks included: recomputation draws the same seeds."""
    case = Case(name, backend=backend, dropout=0.3)
    results = []
    for function in (case, lambda *t: checkpoint(case, *t, use_reentrant=False)):
        torch.manual_seed(3)
        results.append(value_and_grads(function, case.tensors))
    assert equal(*results)


@automatic_and_cuda
@by_name
def test_ten_reruns_are_bit_equal(name, backend):
    case = Case(name, backend=backend, dropout=0.3)

    def seeded():
        torch.manual_seed(3)
        return run(case)

    first = seeded()
    for _ in range(10):
        assert equal(seeded(), first)


@by_name
def test_autocast(name):
    case = Case(name, dtype=torch.float32)
    with torch.autocast("cuda", dtype=BF16):
        assert case.explain() == "triton"
        results = run(case)
    assert results[0].dtype == BF16
    assert all(g.dtype == torch.float32 for g in results[1:])


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@by_name
def test_more_than_2_31_elements(name, backend):
    """Row offsets do not wrap: the last rows equal the same rows computed alone."""
    free, total = torch.cuda.mem_get_info()
    tokens, dim, last = 2**21 + 9, 1024, 9
    if total < 70 * 2**30 or free < 45 * 2**30:
        pytest.skip("needs 45 GiB of free device memory")
    assert tokens * dim > 2**31
    case = Case(name, size=(last, dim, 16, 8), backend=backend)
    x, *rest = case.tensors
    case.routing.fill_(1)
    wide = torch.zeros(tokens, dim, device=DEVICE, dtype=BF16)
    with torch.no_grad():
        wide[-last:] = x
        wide[: 2**20] = x[0]  # what a wrapped offset would read or overwrite
    wide.requires_grad_()
    alone = case(x, *rest)
    (dx_alone,) = torch.autograd.grad(alone, x, x.detach())
    case.routing = case.routing.new_ones(tokens)
    y = case(wide, *rest)
    (dx,) = torch.autograd.grad(y, wide, wide.detach())
    for large, small in ((y, alone), (dx, dx_alone)):
        assert relative(large[-last:].detach(), small.detach()) <= 2**-7
    if name == "modality_gate":
        assert torch.equal(y[-last:], alone) and torch.equal(dx[-last:], dx_alone)


def modules():
    """Contract of each module, itself, and how to call it with bf16 activations ``[..., dim]``."""
    _, dim, rank, heads = USUAL
    on_gpu = {"device": DEVICE}
    base = torch.nn.Linear(dim, dim, dtype=BF16, **on_gpu)
    factors = nn.CPFactors(dim, dim, rank, **on_gpu)
    mask = Case("modality_gate").routing.view(4, -1)
    swiglu = "swiglu_adapter"
    return {
        "SwiGLUAdapter": (swiglu, nn.SwiGLUAdapter(dim, rank, **on_gpu), lambda m, x: m(x)),
        "ModalityExperts": (
            swiglu,
            nn.ModalityExperts(dim, rank, residual="norm", norm_eps=1e-5, **on_gpu),
            lambda m, x: m(x, mask),
        ),
        "CrossModalAdapter": (
            swiglu,
            nn.CrossModalAdapter(dim, rank, **on_gpu),
            lambda m, x: torch.cat(m(x, x[:, :7]), 1),
        ),
        "CPLinear": ("cp_linear", nn.CPLinear(base, factors), lambda m, x: m(x)),
        "ModalityGate token": (
            "projected_modality_gate",
            nn.ModalityGate(dim, heads, **on_gpu),
            lambda m, x: m(x, mask, x),
        ),
        "ModalityGate static": (
            "modality_gate",
            nn.ModalityGate(dim, heads, "static", **on_gpu),
            lambda m, x: m(x, mask),
        ),
    }


MODULES = ["SwiGLUAdapter", "ModalityExperts", "CrossModalAdapter", "CPLinear",
           "ModalityGate token", "ModalityGate static"]  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_modules_use_triton_by_themselves(name, monkeypatch):
    contract, module, call = modules()[name]
    backend, ran = load(f"mmadapt.ops._backends.triton.{contract}"), []

    def spy(part):
        original = getattr(backend, part)

        def spied(*args):
            ran.append(part)
            return original(*args)

        monkeypatch.setattr(backend, part, spied)

    spy("forward")
    spy("backward")
    x = torch.randn(4, USUAL[0] // 4, USUAL[1], device=DEVICE, dtype=BF16, requires_grad=True)
    y = call(module, x)
    y.float().square().sum().backward()
    calls = 2 if name == "CrossModalAdapter" else 1
    assert ran == ["forward"] * calls + ["backward"] * calls
    assert y.dtype == BF16 and y.isfinite().all()
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)
