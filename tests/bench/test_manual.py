"""Hand-written backward against autograd of the formula, in fp64."""

import pytest
import torch
from torch.nn.functional import linear, silu

from bench.peers import manual

T, D, F, R = 5, 7, 9, 3


def draw(*shapes):
    torch.manual_seed(0)
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


def agree(function, formula, tensors, wanted):
    ys, exact = function(*tensors), formula(*tensors)
    torch.testing.assert_close(ys, exact)
    dy = torch.randn_like(exact)
    for a, b in zip(
        torch.autograd.grad(ys, wanted, dy), torch.autograd.grad(exact, wanted, dy), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("base", [False, True])
def test_swiglu(base):
    x, residual, gate, down, up = draw((T, D), (T, D), (R, D), (R, D), (D, R))

    def formula(x, residual, gate, down, up):
        hidden = silu(linear(x, gate)) * linear(x, down)
        return (residual if base else x) + linear(hidden, up)

    def ours(x, residual, *weights):
        return manual.SwiGLU.apply(x, residual if base else None, *weights)

    wanted = [x, gate, down, up, *([residual] if base else [])]
    agree(ours, formula, [x, residual, gate, down, up], wanted)


@pytest.mark.parametrize("size", [(R,), (R, R)])
def test_low_rank_group(size):
    x, a, b, w0, w1, m0, m1 = draw((T, D), (R, D), (F, R), (F, D), (F, D), size, size)

    def formula(x, a, b, w0, w1, m0, m1):
        parts = [
            linear(x, w) + linear(manual.apply_mode(linear(x, a), m), b)
            for w, m in ((w0, m0), (w1, m1))
        ]
        return torch.cat(parts, -1)

    def ours(x, a, b, w0, w1, m0, m1):
        return torch.cat(manual.LowRankGroup.apply(x, a, b, 2, w0, w1, m0, m1), -1)

    agree(ours, formula, [x, a, b, w0, w1, m0, m1], [x, a, b, m0, m1])


def test_lora():
    x, w, a, b = draw((2, T, D), (F, D), (R, D), (F, R))

    def formula(x, w, a, b):
        return linear(x, w) + 2 * linear(linear(x, a), b)

    agree(lambda *t: manual.LoRA.apply(*t, 2.0), formula, [x, w, a, b], [x, a, b])


def test_lora_mlp():
    up, down = ((F, D), (R, D), (F, R)), ((D, F), (R, F), (D, R))
    x, *weights = draw((2, T, D), *up, *up, *down)

    def lora(x, w, a, b):
        return linear(x, w) + 2 * linear(linear(x, a), b)

    def formula(x, *w):
        return lora(silu(lora(x, *w[0:3])) * lora(x, *w[3:6]), *w[6:9])

    factors = [t for i, t in enumerate(weights) if i % 3]
    agree(lambda x, *w: manual.LoRAMLP.apply(x, 2.0, *w), formula, [x, *weights], [x, *factors])
