"""CrossModalAdapter: golden vectors, the variants for ablations, gradients."""

import math

import pytest
import torch
from torch.nn import functional as F

from mmadapt.nn import CrossModalAdapter

DIM, RANK = 12, 5
VARIANTS = {
    "bias": {"bias": True},
    "ungated": {"gated": False},
    "ungated with bias": {"gated": False, "bias": True},
    "own up": {"share_up": False},
    "one input": {"share_input": True},
    "norm and bias": {"bias": True, "norm_eps": 1e-5, "scale": 0.5},
    "norm": {"norm_eps": 1e-5, "scale": 0.5},
}


def make(dtype=torch.float32, **options):
    torch.manual_seed(0)
    module = CrossModalAdapter(DIM, RANK, dtype=dtype, **options)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def sines(rows, columns, k):
    return [
        [0.5 * math.sin(1 + i * columns + j + 10 * k) for j in range(columns)] for i in range(rows)
    ]


@pytest.mark.parametrize(
    ("silu_on", "visual", "text"),
    [
        (
            "W_d",
            (0.054502, -1.706094, 0.682489, 2.903293),
            (0.202061, 0.445556, -0.760894, 1.042672),
        ),
        (
            "W_g",
            (0.815681, -1.116866, 0.558033, 2.179577),
            (0.171292, 0.413514, -0.764749, 1.070548),
        ),
    ],
)
def test_golden_forward(silu_on, visual, text):
    """Both conventions for which factor carries the SiLU: the other one is a change of names."""
    matrices = [torch.tensor(sines(4, 2, k), dtype=torch.float64) for k in range(4)]
    d, g = (matrices[0::2], matrices[1::2])
    if silu_on == "W_g":
        d, g = g, d
    adapter = CrossModalAdapter(4, 2, dtype=torch.float64)
    with torch.no_grad():
        adapter.gate.copy_(torch.stack([w.t() for w in d]))
        adapter.down.copy_(torch.stack([w.t() for w in g]))
        adapter.up.copy_(torch.tensor(sines(2, 4, 4), dtype=torch.float64).t())
    y = adapter(
        torch.tensor([1, -1, 0.5, 2], dtype=torch.float64),
        torch.tensor([0.25, 0.5, -0.75, 1], dtype=torch.float64),
    )
    for found, expected in zip(y, (visual, text), strict=True):
        torch.testing.assert_close(
            found, torch.tensor(expected, dtype=torch.float64), atol=6e-7, rtol=0
        )


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_variants_follow_their_formula(options):
    module = make(torch.float64, **options)
    streams = torch.randn(3, DIM, dtype=torch.float64), torch.randn(2, 4, DIM, dtype=torch.float64)
    for k, (x, y) in enumerate(zip(streams, module(*streams), strict=True)):
        i = 0 if module.share_input else k
        n = x
        if module.norm_weight is not None:
            n = F.rms_norm(x, (DIM,), module.norm_weight[k], module.norm_eps)
        bias = module.gate_bias is not None
        z = F.silu(n @ module.gate[i].t() + (module.gate_bias[i] if bias else 0))
        if module.gated:
            z = z * (n @ module.down[i].t() + (module.down_bias[i] if bias else 0))
        up = module.up if module.share_up else module.up[k]
        torch.testing.assert_close(
            y, x + module.scale * (z @ up.t() + (module.up_bias if bias else 0))
        )


@pytest.mark.parametrize("options", [{}, *VARIANTS.values()], ids=["plain", *VARIANTS])
def test_gradients(options):
    module = make(torch.float64, **options)
    inputs = [torch.randn(2, DIM, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda *x: module(*x), inputs)
    names = [name for name, _ in module.named_parameters()]

    def of_parameters(*values):
        outputs = torch.func.functional_call(
            module, dict(zip(names, values, strict=True)), tuple(inputs)
        )
        return sum(output.sin().sum() for output in outputs)

    assert torch.autograd.gradcheck(of_parameters, tuple(module.parameters()))


@pytest.mark.parametrize("options", [{}, *VARIANTS.values()], ids=["plain", *VARIANTS])
def test_a_fresh_adapter_is_the_identity(options):
    module = CrossModalAdapter(DIM, RANK, **options)
    x = torch.randn(3, DIM), torch.randn(2, DIM)
    assert all(map(torch.equal, module(*x), x))


@pytest.mark.parametrize("options", [{}, {"bias": True}], ids=["plain", "bias"])
def test_half_precision_activations_beside_float32_weights(options):
    module = make(**options)
    x = torch.randn(64, DIM), torch.randn(32, DIM)
    exact = module(*x)
    half = module(*(stream.bfloat16() for stream in x))
    for found, expected in zip(half, exact, strict=True):
        assert found.dtype == torch.bfloat16
        assert (found.float() - expected).norm() <= 2e-2 * expected.norm()


def test_positions_are_independent():
    module = make()
    x = torch.randn(2, 6, DIM)
    order = torch.randperm(6)
    whole, _ = module(x, None)
    torch.testing.assert_close(module(x[:, order], None)[0], whole[:, order])
    torch.testing.assert_close(module(x[:1], None)[0], whole[:1])


def test_a_missing_stream_stays_missing():
    module = make()
    visual, text = module(None, torch.randn(2, DIM))
    assert visual is None and text.shape == (2, DIM)


def test_repr_names_what_differs():
    module = CrossModalAdapter(8, 2, gated=False, share_input=True, bias=True)
    assert "dim=8, rank=2, bias=True, gated=False, share_input=True" in repr(module)
