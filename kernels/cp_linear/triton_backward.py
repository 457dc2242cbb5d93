"""Gradients of the low-rank branch: ``q = dy factor_out``, through the mode to ``dz``; the factors.

    dcore = scale * q (through dropout), dmode = z^T dcore, dz = dcore M^T (summed over the weights)
    dfactor_out = sum_k dy_k^T c_k, dfactor_in = dz^T x

The cores are recomputed from the saved z. Sums over tokens go through fp32 partials of token blocks
fixed by the shape, added in ascending order: reruns are bit-equal.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmadapt.kernels.common.triton_dot import dot
from mmadapt.kernels.cp_linear.triton_project import mode_precision, skinny_product, sum_partials
from mmadapt.kernels.cp_linear.triton_tiles import (
    apply_mode,
    cast,
    keep_factor,
    load_tile,
)


@triton.jit
def _through_core(
    q, rows, inside, mode_ptr, seed_ptr, z_ptr, sum_ptr, dz_ptr, core_ptr, dmode_ptr,
    scale, threshold, kept, R: tl.constexpr, RP: tl.constexpr, DENSE: tl.constexpr,
    DROPOUT: tl.constexpr, CORE: tl.constexpr, MODE: tl.constexpr, DZ: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, MODE_PRECISION: tl.constexpr,
):  # fmt: skip
    ranks = tl.arange(0, RP)
    at = rows[:, None] * RP + ranks[None, :]
    # Rows past the end must not count in dmode.
    dcore = tl.where(inside[:, None], q * scale, 0.0)
    z = load_tile(z_ptr, rows, ranks, R, R, False, R != RP).to(tl.float32)
    if DROPOUT != "none":
        keep = keep_factor(seed_ptr, rows, ranks, threshold, kept, R)
    if DROPOUT == "before":
        z *= keep
    if DROPOUT == "after":
        dcore *= keep
    if CORE:
        core = apply_mode(z, mode_ptr, R, RP, DENSE, False, MODE_PRECISION) * scale
        if DROPOUT == "after":
            core *= keep
        tl.store(core_ptr + at, cast(core, core_ptr.dtype.element_ty), mask=inside[:, None])
    if MODE:
        program = tl.program_id(0).to(tl.int64)
        if DENSE:
            zeros = tl.zeros((RP, RP), tl.float32)
            dmode = tl.dot(tl.trans(z), dcore, zeros, input_precision=MODE_PRECISION)
            tl.store(dmode_ptr + program * (RP * RP) + ranks[:, None] * RP + ranks[None, :], dmode)
        else:
            tl.store(dmode_ptr + program * RP + ranks, tl.sum(z * dcore, 0))
    if DZ:
        dz = apply_mode(dcore, mode_ptr, R, RP, DENSE, True, MODE_PRECISION)
        if DROPOUT == "before":
            dz *= keep
        if not FIRST:
            dz += tl.load(sum_ptr + at)
        if LAST:
            tl.store(dz_ptr + at, cast(dz, dz_ptr.dtype.element_ty), mask=inside[:, None])
        else:
            tl.store(sum_ptr + at, dz, mask=inside[:, None])


@triton.jit(do_not_specialize=["T", "scale", "threshold", "kept"])
def core_gradient_kernel(
    dy_ptr, factor_ptr, partial_ptr, mode_ptr, seed_ptr, z_ptr, sum_ptr, dz_ptr, core_ptr,
    dmode_ptr, T, scale, threshold, kept, D: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    DENSE: tl.constexpr, DROPOUT: tl.constexpr, CORE: tl.constexpr, MODE: tl.constexpr,
    DZ: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, SPLIT: tl.constexpr, FINISH: tl.constexpr, PRECISION: tl.constexpr,
    MODE_PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = rows < T
    rows = tl.minimum(rows, T - 1).to(tl.int64)
    split = tl.program_id(1)
    if FINISH:
        q = sum_partials(partial_ptr, rows, T, RP, BM, SPLIT)
    else:
        q = skinny_product(
            dy_ptr, factor_ptr, rows, split, D, R, RP, False, BM, BK, SPLIT, PRECISION
        )
    if SPLIT > 1 and not FINISH:
        at = partial_ptr + (split.to(tl.int64) * T + rows)[:, None] * RP
        tl.store(at + tl.arange(0, RP)[None, :], q, mask=inside[:, None])
    else:
        _through_core(
            q, rows, inside, mode_ptr, seed_ptr, z_ptr, sum_ptr, dz_ptr, core_ptr, dmode_ptr,
            tl.cast(scale, tl.float32), threshold, tl.cast(kept, tl.float32), R, RP, DENSE,
            DROPOUT, CORE, MODE, DZ, FIRST, LAST, MODE_PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def factor_gradient_kernel(
    a_ptr, b_ptr, partial_ptr, bias_ptr, T, D: tl.constexpr, RP: tl.constexpr, BD: tl.constexpr,
    BT: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``a^T b`` over one chunk of tokens for BD columns of a, and with BIAS their sum over it."""
    cols = tl.program_id(0) * BD + tl.arange(0, BD)
    clamped = cols
    if D % BD != 0:
        clamped = tl.minimum(cols, D - 1)
    ranks = tl.arange(0, RP)
    first = tl.program_id(1).to(tl.int64) * CHUNK
    acc = tl.zeros((BD, RP), tl.float32)
    column_sum = tl.zeros((BD,), tl.float32)
    for step in range(0, CHUNK, BT):
        rows = first + step + tl.arange(0, BT)
        wide = load_tile(a_ptr, rows, clamped, D, T, not EVEN, False)
        thin = load_tile(b_ptr, rows, ranks, RP, T, not EVEN, False)
        acc = dot(tl.trans(wide), thin, acc, PRECISION)
        if BIAS:
            # Another eviction policy makes it another load: what a product reads asynchronously
            # must not be in registers too (wrong sums with Triton 3.6, bench/NOTES.md).
            at = a_ptr + rows[:, None] * D + clamped[None, :]
            again = tl.load(at, (rows < T)[:, None], 0.0, eviction_policy="evict_last")
            column_sum += tl.sum(again.to(tl.float32), 0)
    inside = cols < D
    chunk = tl.program_id(1).to(tl.int64)
    at = partial_ptr + (chunk * D + clamped)[:, None] * RP + ranks[None, :]
    tl.store(at, acc, mask=inside[:, None])
    if BIAS:
        tl.store(bias_ptr + chunk * D + clamped, column_sum, mask=inside)


@triton.jit(do_not_specialize=["count"])
def reduce_kernel(
    partial_ptr, out_ptr, count, A: tl.constexpr, B: tl.constexpr, PADDED_A: tl.constexpr,
    PADDED_B: tl.constexpr, STRIDE_A: tl.constexpr, STRIDE_B: tl.constexpr,
    STEPS: tl.constexpr, BS: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Sum of `count` padded partials into ``[A, B]``, in an order fixed by their count."""
    SIZE: tl.constexpr = PADDED_A * PADDED_B
    entries = tl.program_id(0).to(tl.int64) * BE + tl.arange(0, BE)
    inside = entries < SIZE
    acc = tl.zeros((BS, BE), tl.float32)
    for step in range(STEPS):
        index = step * BS + tl.arange(0, BS)
        at = partial_ptr + index.to(tl.int64)[:, None] * SIZE + entries[None, :]
        acc += tl.load(at, mask=(index < count)[:, None] & inside[None, :], other=0.0)
    a = entries // PADDED_B
    b = entries % PADDED_B
    total = cast(tl.sum(acc, 0), out_ptr.dtype.element_ty)
    tl.store(out_ptr + a * STRIDE_A + b * STRIDE_B, total, mask=(a < A) & (b < B))


def core_gradient(
    dy: Tensor,
    factor_out: Tensor,
    mode: Tensor,
    seed: Tensor | None,
    z: Tensor,
    *,
    dz_sum: Tensor | None,
    dz: Tensor | None,
    core: Tensor | None,
    needs_mode: bool,
    first: bool,
    last: bool,
    padded: int,
    scale: float,
    threshold: int,
    kept: float,
    dropout: str,
    tile: dict,
    precision: str,
) -> Tensor | None:
    """From dy ``[T, d_out]`` of one weight: its core, its part of dz, and partials of dmode.

    dz ``[T, RP]`` is written by the last weight; the others leave their running sum in `dz_sum`
    (fp32, may be None for a single weight). `core` ``[T, RP]``, dz and dmode only where wanted.
    Returns dmode's partials ``[blocks, 1 or RP, RP]`` or None. `tile` as in `project`.
    """
    tokens, dim = dy.shape
    split, bm = tile["split"], tile["bm"]
    blocks = triton.cdiv(tokens, bm)
    dense = mode.ndim == 2
    dmode = None
    if needs_mode:
        dmode = dy.new_empty(blocks, padded if dense else 1, padded, dtype=torch.float32)
    partial = z if split == 1 else dy.new_empty(split, tokens, padded, dtype=torch.float32)
    for finish in (False, True) if split > 1 else (False,):
        core_gradient_kernel[(blocks, 1 if finish else split)](
            dy, factor_out, partial, mode, z if seed is None else seed, z,
            z if dz_sum is None else dz_sum, z if dz is None else dz, z if core is None else core,
            z if dmode is None else dmode, tokens, scale, threshold, kept, D=dim, R=z.shape[1],
            RP=padded, DENSE=dense, DROPOUT=dropout, CORE=core is not None, MODE=needs_mode,
            DZ=dz is not None, FIRST=first, LAST=last, BM=bm, BK=tile["bk"], SPLIT=split,
            FINISH=finish, PRECISION=precision, MODE_PRECISION=mode_precision(dy.dtype),
            num_warps=tile["warps"], num_stages=tile["stages"], enable_fp_fusion=True,
        )  # fmt: skip
    return dmode


def factor_partials(
    a: Tensor, b: Tensor, partial: Tensor, bias: Tensor | None, *, tile: dict, chunk: int,
    precision: str,
) -> None:  # fmt: skip
    """Partials ``[chunks, d, RP]`` of ``a^T b`` and, if given, ``[chunks, d]`` of a's column sums.

    a is ``[T, d]``, b ``[T, RP]``; `chunk` tokens a program. `tile`: bd, bt, warps, stages.
    """
    tokens, dim = a.shape
    bd, bt = tile["bd"], tile["bt"]
    factor_gradient_kernel[(triton.cdiv(dim, bd), partial.shape[0])](
        a, b, partial, partial if bias is None else bias, tokens, D=dim, RP=b.shape[1], BD=bd,
        BT=bt, CHUNK=chunk, EVEN=tokens % chunk == 0, BIAS=bias is not None, PRECISION=precision,
        num_warps=tile["warps"], num_stages=tile["stages"], enable_fp_fusion=True,
    )  # fmt: skip


def reduce(partial: Tensor, out: Tensor, *, transposed: bool = False) -> None:
    """Sum partials ``[count, a, b]`` into the leading part of their shape that `out` has.

    out is ``[a, b]``, ``[b, a]`` if transposed, or ``[b]``.
    """
    count, rows, cols = partial.shape
    a, b = (1, *out.shape)[-2:]
    if transposed:
        a, b = b, a
    slots = min(triton.next_power_of_2(count), 64 if rows * cols < 1024 else 16)
    width = 1024 // slots
    reduce_kernel[(triton.cdiv(rows * cols, width),)](
        partial, out, count, A=a, B=b, PADDED_A=rows, PADDED_B=cols,
        STRIDE_A=1 if transposed else b, STRIDE_B=a if transposed else 1,
        STEPS=triton.next_power_of_2(triton.cdiv(count, slots)), BS=slots, BE=width, num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip
