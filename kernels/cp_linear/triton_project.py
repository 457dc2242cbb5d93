"""``z = x factor_in^T`` and the cores ``c_k = scale * z M_k`` of every weight, x read once.

The skinny product is bound by the one read of x. The mode and the dropout mask are applied to the
fp32 accumulator, so z and the cores are rounded once. Few tokens: the columns of x are split over
SPLIT programs, whose fp32 partial sums a second kernel adds in ascending order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmadapt.kernels.common.triton_dot import dot
from mmadapt.kernels.cp_linear.triton_tiles import (
    apply_mode,
    cast,
    keep_factor,
    load_factor,
    load_tile,
)


@triton.jit
def skinny_product(
    x_ptr, factor_ptr, rows, split, D: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    RANK_FIRST: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``[BM, RP]`` in fp32 over the split's share of the D columns of x."""
    SHARE: tl.constexpr = (D + BK * SPLIT - 1) // (BK * SPLIT) * BK
    EVEN: tl.constexpr = D % (BK * SPLIT) == 0
    ranks = tl.arange(0, RP)
    acc = tl.zeros((BM, RP), tl.float32)
    for step in range(0, SHARE, BK):
        cols = split * SHARE + step + tl.arange(0, BK)
        tile = load_tile(x_ptr, rows, cols, D, D, False, not EVEN)
        factor = load_factor(factor_ptr, cols, ranks, D, R, RP, RANK_FIRST, not EVEN)
        acc = dot(tile, cast(factor, tile.dtype), acc, PRECISION)
    return acc


@triton.jit
def sum_partials(
    partial_ptr, rows, T, RP: tl.constexpr, BM: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    at = partial_ptr + rows[:, None] * RP + tl.arange(0, RP)[None, :]
    acc = tl.zeros((BM, RP), tl.float32)
    for split in range(SPLIT):
        acc += tl.load(at + tl.cast(split, tl.int64) * T * RP)
    return acc


@triton.jit
def core_of(
    z, mode_ptr, seed_ptr, rows, scale, threshold, kept, R: tl.constexpr, RP: tl.constexpr,
    DENSE: tl.constexpr, DROPOUT: tl.constexpr, MODE_PRECISION: tl.constexpr,
):  # fmt: skip
    """``scale * z M`` with dropout before, after or nowhere."""
    core = z
    if DROPOUT == "before":
        core *= keep_factor(seed_ptr, rows, tl.arange(0, RP), threshold, kept, R)
    core = apply_mode(core, mode_ptr, R, RP, DENSE, False, MODE_PRECISION)
    if DROPOUT == "after":
        core *= keep_factor(seed_ptr, rows, tl.arange(0, RP), threshold, kept, R)
    return core * scale


@triton.jit
def _write(
    z, rows, inside, modes, seeds_ptr, z_ptr, core_ptr, T, scale, threshold, kept,
    R: tl.constexpr, RP: tl.constexpr, K: tl.constexpr, DENSE: tl.constexpr,
    DROPOUT: tl.constexpr, MODE_PRECISION: tl.constexpr, WRITE_Z: tl.constexpr,
):  # fmt: skip
    ranks = tl.arange(0, RP)
    if WRITE_Z:
        at = z_ptr + rows[:, None] * R + ranks[None, :]
        mask = inside[:, None] & (ranks < R)[None, :]
        tl.store(at, cast(z, z_ptr.dtype.element_ty), mask=mask)
    at = core_ptr + rows[:, None] * RP + ranks[None, :]
    for k in tl.static_range(K):
        core = core_of(
            z, modes[k], seeds_ptr + k, rows, scale, threshold, kept, R, RP, DENSE[k], DROPOUT,
            MODE_PRECISION,
        )  # fmt: skip
        tl.store(
            at + tl.cast(T, tl.int64) * (k * RP),
            cast(core, core_ptr.dtype.element_ty),
            mask=inside[:, None],
        )


@triton.jit(do_not_specialize=["T", "scale", "threshold", "kept"])
def project_kernel(
    x_ptr, factor_ptr, modes, seeds_ptr, z_ptr, core_ptr, partial_ptr, T, scale, threshold, kept,
    D: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, K: tl.constexpr, DENSE: tl.constexpr,
    DROPOUT: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, MODE_PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:  # the GEMM may start beside this kernel: it waits before it reads the cores
        tl.extra.cuda.gdc_launch_dependents()
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = rows < T
    rows = tl.minimum(rows, T - 1).to(tl.int64)
    split = tl.program_id(1)
    acc = skinny_product(x_ptr, factor_ptr, rows, split, D, R, RP, True, BM, BK, SPLIT, PRECISION)
    if SPLIT > 1:
        at = partial_ptr + (split.to(tl.int64) * T + rows)[:, None] * RP
        tl.store(at + tl.arange(0, RP)[None, :], acc, mask=inside[:, None])
    else:
        _write(
            acc, rows, inside, modes, seeds_ptr, z_ptr, core_ptr, T, tl.cast(scale, tl.float32),
            threshold, tl.cast(kept, tl.float32), R, RP, K, DENSE, DROPOUT, MODE_PRECISION, True,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "scale", "threshold", "kept"])
def finish_kernel(
    modes, seeds_ptr, z_ptr, core_ptr, partial_ptr, T, scale, threshold, kept,
    R: tl.constexpr, RP: tl.constexpr, K: tl.constexpr, DENSE: tl.constexpr,
    DROPOUT: tl.constexpr, BM: tl.constexpr, SPLIT: tl.constexpr, MODE_PRECISION: tl.constexpr,
):  # fmt: skip
    """z and the cores from the partial sums; with SPLIT == 0 the cores alone, from z."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = rows < T
    rows = tl.minimum(rows, T - 1).to(tl.int64)
    if SPLIT == 0:
        z = load_tile(z_ptr, rows, tl.arange(0, RP), R, R, False, R != RP).to(tl.float32)
    else:
        z = sum_partials(partial_ptr, rows, T, RP, BM, SPLIT)
    _write(
        z, rows, inside, modes, seeds_ptr, z_ptr, core_ptr, T, tl.cast(scale, tl.float32),
        threshold, tl.cast(kept, tl.float32), R, RP, K, DENSE, DROPOUT, MODE_PRECISION, SPLIT > 0,
    )  # fmt: skip


def project(
    x: Tensor,
    factor_in: Tensor,
    modes: list[Tensor],
    seeds: Tensor | None,
    z: Tensor,
    core: Tensor,
    *,
    scale: float,
    threshold: int,
    kept: float,
    dropout: str,
    tile: dict,
    precision: str,
    overlap: bool = False,
) -> None:
    """Fill z ``[T, R]`` and core ``[K, T, RP]`` from x ``[T, d]`` and factor_in ``[R, d]``.

    `tile`: bm, bk, split, warps, stages. `dropout`: "none", "before" or "after"; `kept` is
    1 / (1 - p). `overlap`: let the next kernel start before this one ends (it has to wait itself).
    """
    tokens, dim = x.shape
    count, _, padded = core.shape
    split = tile["split"]
    partial = core if split == 1 else x.new_empty(split, tokens, padded, dtype=torch.float32)
    seeds = core if seeds is None else seeds  # never read without dropout
    blocks = triton.cdiv(tokens, tile["bm"])
    settings = {
        "R": z.shape[1], "RP": padded, "K": count, "DENSE": tuple(m.ndim == 2 for m in modes),
        "DROPOUT": dropout, "BM": tile["bm"], "SPLIT": split,
        "MODE_PRECISION": mode_precision(x.dtype), "num_warps": tile["warps"],
        "enable_fp_fusion": True,
    }  # fmt: skip
    numbers = (tokens, scale, threshold, kept)
    project_kernel[(blocks, split)](
        x, factor_in, tuple(modes), seeds, z, core, partial, *numbers, D=dim, BK=tile["bk"],
        PRECISION=precision, PDL=overlap and split == 1, num_stages=tile["stages"], **settings,
    )  # fmt: skip
    if split > 1:
        finish_kernel[(blocks,)](tuple(modes), seeds, z, core, partial, *numbers, **settings)


def cores(
    modes: list[Tensor],
    seeds: Tensor | None,
    z: Tensor,
    core: Tensor,
    *,
    scale: float,
    threshold: int,
    kept: float,
    dropout: str,
) -> None:
    """Fill core ``[K, T, RP]`` from z ``[T, R]``."""
    count, tokens, padded = core.shape
    seeds = core if seeds is None else seeds
    finish_kernel[(triton.cdiv(tokens, 32),)](
        tuple(modes), seeds, z, core, core, tokens, scale, threshold, kept, R=z.shape[1],
        RP=padded, K=count, DENSE=tuple(m.ndim == 2 for m in modes), DROPOUT=dropout, BM=32,
        SPLIT=0, MODE_PRECISION=mode_precision(z.dtype), num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip


def mode_precision(dtype: torch.dtype) -> str:
    """Products with the mode are fp32: in three TF32 passes where activations have 16 bits."""
    return "ieee" if dtype == torch.float32 else "tf32x3"
