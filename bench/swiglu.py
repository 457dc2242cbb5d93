"""One problem of the SwiGLU adapter and the ways to compute it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from mmadapt.ops import swiglu_adapter


@dataclass(frozen=True)
class Problem:
    """x [T, d], gate and down [m, d], up [d, m] and dy, in one dtype, on the CPU."""

    tokens: int
    dim: int
    rank: int
    dtype: torch.dtype = torch.float32

    def operands(self) -> list[Tensor]:
        shapes = [(self.tokens, self.dim), *[(self.rank, self.dim)] * 2, (self.dim, self.rank)]
        scales = (1, self.dim**-0.5, self.dim**-0.5, self.rank**-0.5)
        return [
            (torch.randn(s) * c).to(self.dtype).requires_grad_()
            for s, c in zip(shapes, scales, strict=True)
        ]

    @property
    def forward_flops(self) -> int:
        return 6 * self.tokens * self.dim * self.rank


def eager(x: Tensor, gate: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """What a user writes: five calls."""
    return x + linear(silu(linear(x, gate)) * linear(x, down), up)


def eager_packed(x: Tensor, gate: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """The same in three larger calls: one product for both pre-activations, sum inside the last."""
    pre_gate, pre_down = linear(x, torch.cat((gate, down))).chunk(2, -1)
    return torch.addmm(x, silu(pre_gate) * pre_down, up.t())


def op(backend: str) -> Callable[..., Tensor]:
    return lambda *operands: swiglu_adapter(*operands, backend=backend)


PROVIDERS: dict[str, Callable[..., Tensor]] = {
    "eager": eager,
    "eager-packed": eager_packed,
    "reference": op("reference"),
    "cpu": op("cpu"),
}


def forward(provider: str, operands: list[Tensor]) -> Callable[[], object]:
    def run():
        with torch.no_grad():
            return PROVIDERS[provider](*operands)

    return run


def forward_backward(provider: str, operands: list[Tensor]) -> Callable[[], object]:
    dy = torch.randn_like(operands[0])

    def run():
        return torch.autograd.grad(PROVIDERS[provider](*operands), operands, dy)

    return run


PASSES = {"forward": forward, "forward+backward": forward_backward}


def check(provider: str, operands: list[Tensor]) -> None:
    """No timing of a wrong result: error against fp64 at most twice that of eager."""
    dy = torch.randn_like(operands[0])

    def results(function, tensors):
        y = function(*tensors)
        return [y, *torch.autograd.grad(y, tensors, dy.to(y.dtype))]

    wide = [t.detach().double().requires_grad_() for t in operands]
    exact = results(eager, wide)
    theirs, ours = results(eager, operands), results(PROVIDERS[provider], operands)
    for e, a, b in zip(exact, theirs, ours, strict=True):
        unit = torch.finfo(a.dtype).eps * e.norm()
        assert (b.double() - e).norm() <= 2 * (a.double() - e).norm() + unit
