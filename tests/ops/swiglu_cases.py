"""Problems of swiglu_adapter at the level of a backend, and what eager torch makes of them."""

import torch

from mmadapt.kernels.swiglu_adapter import reference

EPS = 1e-6
NEED_ALL = (True,) * 5


def problem(
    tokens,
    dim,
    rank,
    experts=1,
    *,
    shared=False,
    norm=False,
    dtypes=(torch.float32, torch.float32),
    device="cpu",
    runs=1,
    busy=2,
):
    """x, gate, down, up, expert, norm weight, dy; only the first `busy` experts get tokens.

    `dtypes`: of activations and of weights. Experts come in runs of `runs` tokens.
    """
    dtype, weight_dtype = dtypes
    ups = 1 if shared else experts

    def draw(shape, dtype, scale=1.0):
        return (torch.randn(shape, device=device) * scale).to(dtype)

    x, dy = draw((tokens, dim), dtype), draw((tokens, dim), dtype)
    gate, down = (draw((experts, rank, dim), weight_dtype, dim**-0.5) for _ in range(2))
    up = draw((ups, dim, rank), weight_dtype, rank**-0.5)
    weight = (0.5 + torch.rand(dim, device=device)).to(weight_dtype) if norm else None
    expert = None
    if experts > 1:
        pattern = torch.randint(-1, min(experts, busy), (tokens // runs + 1,), device=device)
        expert = pattern.repeat_interleave(runs)[:tokens].int()
    return x, gate, down, up, expert, weight, dy


def run(backend, x, gate, down, up, expert, weight, dy, residual, scale=0.7, needs=NEED_ALL):
    """y, then the five gradients, from a backend module."""
    args = (x, gate, down, up, expert, weight, EPS)
    y, *saved = backend.forward(*args, residual, scale)
    return y, *backend.backward(dy, *args, *saved, residual, scale, needs)


def run_formula(dtype, x, gate, down, up, expert, weight, dy, residual, scale=0.7):
    """The same by autograd, computed in `dtype`; gradients in the dtype of their tensor."""
    operands = [x, gate, down, up] + ([] if weight is None else [weight])
    leaves = [t.detach().clone().requires_grad_() for t in operands]
    wide = [t.double() if dtype == torch.float64 else t for t in leaves]
    # Eager torch multiplies matrices of one dtype: fp32 weights are cast to the activation's.
    cast = [t.to(dtype) for t in wide]
    norm = None if weight is None else (cast[4], EPS)
    y = reference.swiglu_adapter(
        *cast[:4], expert=expert, norm=norm, residual=residual, scale=scale
    )
    grads = torch.autograd.grad(y, leaves, dy.to(dtype))
    if weight is None:
        grads = (*grads, torch.empty(0, dtype=grads[1].dtype, device=x.device))
    return y, *grads


def run_exact(*args, **settings):
    """The formula in fp64."""
    x, gate, down, up, expert, weight, dy, residual = args
    wide = [None if t is None else t.double() for t in (x, gate, down, up, weight, dy)]
    return run_formula(torch.float64, *wide[:4], expert, *wide[4:], residual, **settings)
