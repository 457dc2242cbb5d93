"""The contracts on a GPU: agreement with the CPU in fp64, no host sync, CUDA graphs, autocast."""

import pytest
import torch

from mmadapt.ops import cp_linear, modality_gate, projected_modality_gate, swiglu_adapter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOKENS, DIM, RANK, HEADS = 33, 12, 5, 3


NAMES = ["swiglu_adapter", "cp_linear", "modality_gate", "projected_modality_gate"]


def case(name, device, dtype=torch.float64):
    """A function of floating tensors, and those tensors, the same numbers on every device."""
    torch.manual_seed(0)
    expert, mask = torch.randint(-1, 2, (TOKENS,)), torch.rand(TOKENS) < 0.5
    shapes = {
        "swiglu_adapter": [(2, RANK, DIM), (2, RANK, DIM), (2, DIM, RANK), (DIM,)],
        "cp_linear": [(RANK, DIM), (DIM, RANK), (RANK, RANK)],
        "modality_gate": [(HEADS,)],
        "projected_modality_gate": [(HEADS, DIM)],
    }
    tensors = [torch.randn(s, dtype=torch.float64) for s in ((TOKENS, DIM), *shapes[name])]
    weight = torch.randn(DIM, DIM, dtype=torch.float64).to(device, dtype)
    expert, mask = expert.to(device), mask.to(device)
    functions = {
        "swiglu_adapter": lambda x, gate, down, up, norm: swiglu_adapter(
            x, gate, down, up, expert=expert, norm=(norm, 1e-5), residual="norm"
        ),
        "cp_linear": lambda x, u, v, p: cp_linear(x, weight, None, u, v, p, dropout=0.3),
        "modality_gate": lambda x, logits: modality_gate(x, logits, mask),
        "projected_modality_gate": lambda x, w: projected_modality_gate(x, x, w, mask),
    }
    return functions[name], [t.to(device, dtype).requires_grad_() for t in tensors]


def value_and_grads(function, tensors):
    y = function(*tensors)
    return [y, *torch.autograd.grad(y.square().sum(), tensors)]


@pytest.mark.parametrize("name", NAMES)
def test_fp64_equals_the_cpu(name):
    function, tensors = case(name, "cpu")
    on_gpu, gpu_tensors = case(name, "cuda")
    with pytest.MonkeyPatch.context() as patch:
        # Seeds from one generator for both devices: masks are a function of the seed alone.
        patch.setattr(torch, "randint", lambda high, size, **kw: torch.full(size, 7, **kw))
        expected, actual = value_and_grads(function, tensors), value_and_grads(on_gpu, gpu_tensors)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_no_call_waits_for_the_device(name, dtype):
    function, tensors = case(name, "cuda", dtype)
    value_and_grads(function, tensors)
    torch.cuda.set_sync_debug_mode("error")
    try:
        value_and_grads(function, tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", NAMES)
def test_cuda_graphs(name):
    function, tensors = case(name, "cuda", torch.float32)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        value_and_grads(function, tensors)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = value_and_grads(function, tensors)
    with torch.no_grad():
        tensors[0].normal_()
    graph.replay()
    if name == "cp_linear":  # its dropout masks differ from replay to replay
        assert torch.isfinite(captured[0]).all()
        return
    for a, b in zip(captured, value_and_grads(function, tensors), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name):
    function, tensors = case(name, "cuda", torch.float32)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        results = value_and_grads(function, tensors)
    assert results[0].dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in results[1:])


def test_more_than_2_31_elements():
    """Row offsets do not wrap: the last rows equal the same rows computed alone."""
    tokens, dim = 2**20 + 7, 2049
    if torch.cuda.get_device_properties(0).total_memory < 80 * 2**30:
        pytest.skip("needs 80 GiB of device memory")
    x = torch.randn(tokens, dim, device="cuda", dtype=torch.bfloat16)
    weights = [
        torch.randn(s, device="cuda").bfloat16() / 45 for s in ((4, dim), (4, dim), (dim, 4))
    ]
    assert x.numel() > 2**31
    y = swiglu_adapter(x, *weights)
    torch.testing.assert_close(y[-9:], swiglu_adapter(x[-9:], *weights))
    mask = torch.ones(tokens, dtype=torch.bool, device="cuda")
    logits = torch.ones(1, device="cuda")
    last = modality_gate(x[-9:], logits, mask[-9:])
    assert torch.equal(modality_gate(x, logits, mask)[-9:], last)
