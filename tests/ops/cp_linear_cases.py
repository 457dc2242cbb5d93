"""Operands of `cp_linear_group` and its runs, for the tests of its GPU backends."""

import torch

from mmadapt.kernels.cp_linear import reference
from mmadapt.ops import cp_linear_group

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Case:
    """Operands of a group; `dims` are d_in, d_out and R."""

    def __init__(
        self, tokens=33, dims=(40, 48, 12), count=1, dense=(False,), dtype=torch.float32,
        parameter_dtype=None, bias=True,
    ):  # fmt: skip
        dim_in, dim_out, rank = dims
        kind = {"dtype": dtype, "device": DEVICE}
        self.parameter_dtype = parameter_dtype or dtype
        self.count, self.tokens, self.rank = count, tokens, rank
        self.x = torch.randn(tokens, dim_in, device=DEVICE).to(dtype)
        self.weights = [self.draw(dim_out, dim_in).to(dtype) for _ in range(count)]
        self.biases = [self.draw(dim_out) if bias and k != 1 else None for k in range(count)]
        self.factor_in, self.factor_out = self.draw(rank, dim_in), self.draw(dim_out, rank)
        shapes = [(rank, rank) if dense[k % len(dense)] else (rank,) for k in range(count)]
        self.modes = [self.draw(*shape) for shape in shapes]
        self.dys = [torch.randn(tokens, dim_out, device=DEVICE).to(**kind) for _ in range(count)]

    def draw(self, *shape):
        return (torch.randn(shape, device=DEVICE) / shape[-1] ** 0.5).to(self.parameter_dtype)

    def run(self, backend, needs=None, dtype=None, **settings):
        """Outputs and gradients of ``x, factor_in, factor_out, *modes, *biases``; None if frozen.

        `backend`: a name, or None for the formula, in the dtype of x or all in `dtype`.
        """
        leaves = [self.x, self.factor_in, self.factor_out, *self.modes, *self.biases]
        present = [t is not None for t in leaves]
        needs = [True] * len(leaves) if needs is None else needs
        leaves = [
            None if t is None else t.detach().to(dtype or t.dtype).requires_grad_(n)
            for t, n in zip(leaves, needs, strict=True)
        ]
        x, factor_in, factor_out, *rest = leaves
        modes, biases = rest[: self.count], rest[self.count :]
        weights = [w.to(dtype or w.dtype) for w in self.weights]
        torch.manual_seed(5)
        if backend is None:
            ys = self.formula(x, weights, biases, factor_in, factor_out, modes, **settings)
        else:
            ys = cp_linear_group(
                x, weights, biases, factor_in, factor_out, modes, backend=backend, **settings
            )
        wanted = [t for t, n, p in zip(leaves, needs, present, strict=True) if n and p]
        dys = [dy.to(y.dtype) for dy, y in zip(self.dys, ys, strict=True)]
        grads = torch.autograd.grad(ys, wanted, dys) if wanted else ()
        return [*(y.detach() for y in ys), *grads]

    def formula(self, x, weights, biases, factor_in, factor_out, modes, dropout=0.0, **settings):
        seeds = torch.randint(2**62, (self.count,), device=DEVICE) if dropout else [None] * 9

        def cast(tensor):
            return None if tensor is None else tensor.to(x.dtype)

        return [
            reference.cp_linear(
                x, w, cast(b), cast(factor_in), cast(factor_out), cast(m), dropout=dropout,
                keep=reference.keep_mask(s, self.tokens, self.rank, dropout) if dropout else None,
                **settings,
            )
            for w, b, m, s in zip(weights, biases, modes, seeds, strict=False)
        ]  # fmt: skip

    def check(self, rule, backend, **settings):
        """Outputs and every gradient of a backend obey the error rule."""
        ours = self.run(backend, **settings)
        eager = self.run(None, **settings)
        exact = self.run(None, dtype=torch.float64, **settings)
        for a, e, x in zip(ours, eager, exact, strict=True):
            rule(a, e, x, largest=self.tokens > 1)
