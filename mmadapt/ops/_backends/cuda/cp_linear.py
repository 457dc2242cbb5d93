"""`cp_linear` in CUDA C++ for Hopper (csrc/cuda/cp_linear_*_sm90.cu).

z and every core, then one of two ways to y: a GEMM whose K continues over the ranks, or cuBLAS
accumulating the frozen product onto the low-rank term. z is a kernel of its own, or, where all
modes are vectors, work of the first weight's GEMM. The gradient of x likewise, over all weights of
a group at once; the other gradients come from the Triton kernels.
"""

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmadapt.ops._allocate import cp_linear_outputs
from mmadapt.ops._backends.cuda._launch import (
    DTYPES,
    address,
    aligned,
    extension,
    on_device,
    stream,
    unsupported_device,
)
from mmadapt.ops._backends.triton import cp_linear as triton_backend
from mmadapt.ops._backends.triton._configs import tiles

_C = extension()
if not hasattr(_C.cuda, "cp_linear_gemm"):
    raise ImportError("mmadapt._C was built without sm_90a")

MAX_RANK = 128
MAX_GROUP: int = _C.cuda.CP_LINEAR_MAX_GROUP
MULTIPROCESSORS = 132
MULTIPLE = 8
"""d_in, d_out and R: rows start at multiples of 16 bytes."""

DROPOUTS = {"none": 0, "before": 1, "after": 2}  # mmadapt_dropout

SETTINGS = {"tile": 0, "cluster": 0, "group": 0, "overlap": 1, "split": 0}
"""Of the launchers (0: their choice), beside "gemm": 1 for the GEMM here, 0 for cuBLAS; and
"fused": 1 for z within that GEMM, 0 for a kernel before it. Mode matrices always have the latter.

Tests and benchmarks set any of them: ``override({"cp_linear.cuda": {...}})`` of the Triton
backend's tables, and "cp_linear.cuda_backward" for the gradient of x.
"""


def prefers_gemm(tokens: int, columns: int) -> bool:
    """Whether the GEMM here is faster than cuBLAS, which needs a second pass over y.

    It was at every size tried on an H200, from 2,048 rows on (bench/NOTES.md). A tile holds 128
    rows and all of K, so few tokens leave most of the GPU idle, where cuBLAS splits K; where the
    border lies is not measured.
    """
    row_tiles, column_tiles = -(-tokens // 128), -(-columns // 128)
    return row_tiles * column_tiles >= 96


@functools.lru_cache(maxsize=1024)  # asked on every call, and answered by the extension
def prefers_fused(tokens: int, dim_in: int, dim_out: int, rank: int) -> bool:
    """Whether z within the first weight's GEMM is faster than a kernel before it.

    Where it fits into time in which multiprocessors have no tile, it is free. Elsewhere every round
    of units costs a read of 256 rows by two multiprocessors, however few rows there are, and the
    kernel before, which splits d_in, a launch and a read of x. On an H200 it was faster at d=4096
    from 2,048 tokens on, as fast at d=768, and slower beyond 64 ranks (bench/NOTES.md); the sums in
    between are reckoned.
    """
    if rank > 64:
        return False
    units, _, hidden = _C.cuda.cp_linear_plan_fused(tokens, dim_out, rank)
    rounds = -(-units // (MULTIPROCESSORS // 2))
    unit_us, kernel_us = 1 + dim_in * 4.6e-3, 3 + tokens * dim_in * 0.6e-6
    return hidden or rounds * unit_us < kernel_us


def unsupported(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    factor_in: Tensor,
    factor_out: Tensor,
    modes: Sequence[Tensor],
) -> str | None:
    """The constraint that rules this backend out, or None."""
    reason = unsupported_device("x", x, (torch.bfloat16, torch.float16), hopper=True)
    if reason is not None:
        return reason
    reason = triton_backend.unsupported(x, weights, biases, factor_in, factor_out, modes)
    if reason is not None:
        return reason  # it makes the parameters' gradients
    return unsupported_sizes(x.shape[0], *factor_in.shape, factor_out.shape[0], len(weights))


def unsupported_sizes(tokens: int, rank: int, dim_in: int, dim_out: int, count: int) -> str | None:
    for name, size in (("d_in", dim_in), ("d_out", dim_out), ("R", rank)):
        if size % MULTIPLE != 0:
            return f"{name} {size} is not a multiple of {MULTIPLE}"
    if rank > MAX_RANK:
        return f"R {rank} is larger than {MAX_RANK}"
    if count > MAX_GROUP:
        return f"{count} weights on one x, at most {MAX_GROUP}"
    if tokens >= 2**31 - 256:
        return f"x has {tokens} rows, too many"
    return None


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    factor_in: Tensor,
    factor_out: Tensor,
    modes: Sequence[Tensor],
    seeds: Tensor | None,
    scale: float,
    dropout: float,
    dropout_at: str,
) -> tuple[list[Tensor], Tensor]:
    """ys and z ``[T, R]``; see the reference backend."""
    ys, z = cp_linear_outputs(x, weights, factor_in)
    if x.shape[0] == 0:
        return ys, z
    # Before _project, since the GEMM that overlaps with it may read its operands early.
    x, weights = aligned(x), [aligned(w.to(x.dtype)) for w in weights]
    sizes = (*x.shape, ys[0].shape[1], z.shape[1])
    use = _settings(
        "cp_linear.cuda", x.shape[1], ys[0], z.shape[1], len(weights), fused=prefers_fused(*sizes)
    )
    core = x.new_empty(len(weights), *z.shape)
    projection = (modes, seeds, scale, dropout, dropout_at, z, core)
    fused = use["gemm"] and use["fused"] and all(m.ndim == 1 for m in modes)
    with on_device(x):
        factor_in, factor_out = _narrow(x.dtype, factor_in, factor_out)
        if fused:
            _fused(x, weights[0], factor_in, factor_out, biases[0], ys[0], *projection, use)
        else:
            _project(x, factor_in, *projection, use["split"])
        for k, (weight, bias, y) in enumerate(zip(weights, biases, ys, strict=True)):
            if fused and k == 0:
                continue
            if use["gemm"]:
                overlap = use["overlap"] if k == 0 else 0
                _gemm([x], [weight], core[k], factor_out, bias, y, False, use, overlap)
            else:
                triton_backend.accumulate(
                    [x], [weight.t()], core[k], factor_out.t(), bias, y, gemm_first=False
                )
    return ys, z


def backward(
    dys: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    factor_in: Tensor,
    factor_out: Tensor,
    modes: Sequence[Tensor],
    z: Tensor,
    seeds: Tensor | None,
    scale: float,
    dropout: float,
    dropout_at: str,
    needs: tuple[bool, bool, bool],
    needs_modes: tuple[bool, ...],
    needs_biases: tuple[bool, ...],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """dx, dfactor_in, dfactor_out, dmodes, dbiases; size 0 where nobody needs them."""
    return triton_backend.backward(
        dys, x, weights, biases, factor_in, factor_out, modes, z, seeds, scale, dropout,
        dropout_at, needs, needs_modes, needs_biases, input_gradient=_input_gradient,
    )  # fmt: skip


def _input_gradient(
    dys: list[Tensor], weights: list[Tensor], dz: Tensor, factor_in: Tensor, dx: Tensor
) -> None:
    use = _settings(
        "cp_linear.cuda_backward", dys[0].shape[1], dx, factor_in.shape[0], len(weights)
    )
    if use["gemm"]:
        (factor_in,) = _narrow(dx.dtype, factor_in)
        _gemm(dys, weights, dz, factor_in, None, dx, True, use, 0)
    else:
        triton_backend.accumulate(dys, weights, dz, factor_in, None, dx, gemm_first=False)


def _settings(
    name: str, inner: int, y: Tensor, rank: int, count: int, fused: bool = False
) -> Mapping[str, int]:
    tokens, columns = y.shape
    default = SETTINGS | {"gemm": int(prefers_gemm(tokens, columns)), "fused": int(fused)}
    found = tiles(name, y, default, T=tokens, d_in=inner, d_out=columns, R=rank, K=count)
    return {**default, **found}


def _narrow(dtype: torch.dtype, *factors: Tensor) -> list[Tensor]:
    """One or two factors in 16 bits; those of fp32 are copied by one kernel."""
    wide = [f for f in factors if f.dtype != dtype]
    if not wide:
        return [aligned(f) for f in factors]
    wide = [aligned(f) for f in wide]
    copies = [f.new_empty(f.shape, dtype=dtype) for f in wide]
    sources, targets = [*wide, None][:2], [*copies, None][:2]
    sizes = [0 if f is None else f.numel() for f in sources]
    _C.cuda.cp_linear_pack(
        *sizes, DTYPES[dtype], *map(address, (*sources, *targets)), stream(factors[0])
    )
    made = iter(copies)
    return [aligned(f) if f.dtype == dtype else next(made) for f in factors]


def _project(
    x: Tensor,
    factor_in: Tensor,
    modes: Sequence[Tensor],
    seeds: Tensor | None,
    scale: float,
    dropout: float,
    dropout_at: str,
    z: Tensor,
    core: Tensor,
    split: int,
) -> None:
    """Fills z ``[T, R]`` and core ``[K, T, R]``; factor_in in the dtype of x."""
    dense = sum((m.ndim == 2) << k for k, m in enumerate(modes))
    _C.cuda.cp_linear_project(
        x.shape[0], x.shape[1], z.shape[1], len(modes), DTYPES[x.dtype], dense, _wide(modes),
        *_dropout(seeds, dropout, dropout_at), scale, split, address(x), address(factor_in),
        *_addresses(modes), address(seeds), address(z), address(core), stream(x),
    )  # fmt: skip


def _fused(
    x: Tensor,
    weight: Tensor,
    factor_in: Tensor,
    factor_out: Tensor,
    bias: Tensor | None,
    y: Tensor,
    modes: Sequence[Tensor],
    seeds: Tensor | None,
    scale: float,
    dropout: float,
    dropout_at: str,
    z: Tensor,
    core: Tensor,
    use: Mapping[str, int],
) -> None:
    """`_project` and `_gemm` of the first weight, which fills y ``[T, d_out]``."""
    words = x.new_empty(_C.cuda.cp_linear_fused_words(x.shape[0]), dtype=torch.int32)
    _C.cuda.cp_linear_fused(
        *x.shape, y.shape[1], z.shape[1], len(modes), DTYPES[x.dtype],
        DTYPES[y.dtype if bias is None else bias.dtype], _wide(modes),
        *_dropout(seeds, dropout, dropout_at), scale, use["tile"], use["cluster"], use["group"],
        use["overlap"], *map(address, (x, weight, factor_in, factor_out, bias)),
        *_addresses(modes), *map(address, (seeds, z, core, y, words)), words.numel(), stream(y),
    )  # fmt: skip


def _wide(modes: Sequence[Tensor]) -> int:
    return sum((m.dtype == torch.float32) << k for k, m in enumerate(modes))


def _dropout(seeds: Tensor | None, dropout: float, dropout_at: str) -> tuple[int, int, float]:
    """Kind, threshold of the hash, factor on what is kept."""
    kind = DROPOUTS["none" if seeds is None else dropout_at]
    return kind, round(dropout * (1 << 24)), 1.0 / (1.0 - dropout)


def _gemm(
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    core: Tensor,
    factor: Tensor,
    bias: Tensor | None,
    y: Tensor,
    transposed: bool,
    use: Mapping[str, int],
    overlap: int,
) -> None:
    """``y = sum_k left_k right_k^T + core factor^T + bias``, or with right_k and factor themselves.

    `overlap`: the last kernel on the stream is the one that makes `core`, and makes nothing else.
    """
    lefts, rights = [aligned(t) for t in lefts], [aligned(t) for t in rights]
    _C.cuda.cp_linear_gemm(
        *lefts[0].shape, y.shape[1], factor.shape[0 if transposed else 1], core.shape[1],
        len(lefts), DTYPES[y.dtype], DTYPES[y.dtype if bias is None else bias.dtype], transposed,
        use["tile"], use["cluster"], use["group"], overlap, *_addresses(lefts),
        *_addresses(rights), *map(address, (core, factor, bias, y)), stream(y),
    )  # fmt: skip


def _addresses(members: Sequence[Tensor]) -> list[int]:
    """One for every weight that a group may have."""
    return [address(m) for m in members] + [0] * (MAX_GROUP - len(members))
