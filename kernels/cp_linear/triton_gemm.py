"""The frozen product and the low-rank term in one GEMM: ``y = a B + c F + bias``.

Forward: ``a = x, B = W^T, F = factor_out^T``; gradient of x: ``a = dy, B = W, F = factor_in``.
After the steps of the frozen product the same fp32 accumulator takes one more step over the ranks,
so y is written once; cuBLAS needs a second pass over y. The low-rank step comes last: with an
overlapped launch the kernel that computes c only has to be done by then.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mmadapt.kernels.common.triton_dot import dot
from mmadapt.kernels.cp_linear.triton_project import core_of, mode_precision
from mmadapt.kernels.cp_linear.triton_tiles import cast, load_factor, load_tile


@triton.jit
def _weight_tile(
    w, first, cols, step, N: tl.constexpr, D: tl.constexpr, W_ROWS_ARE_COLUMNS: tl.constexpr,
    BK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """``[BK, BN]`` of B, stored ``[N, D]`` (W_ROWS_ARE_COLUMNS) or ``[D, N]``."""
    inner = step + tl.arange(0, BK)
    if TMA and W_ROWS_ARE_COLUMNS:
        tile = tl.trans(w.load([first, step]))
    elif TMA:
        tile = w.load([step, first])
    elif W_ROWS_ARE_COLUMNS:
        tile = tl.trans(load_tile(w, cols, inner, D, D, False, D % BK != 0))
    else:
        tile = load_tile(w, inner, cols, N, D, D % BK != 0, False)
    return tile


@triton.jit
def _input_tile(
    a, first, rows, step, D: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    if TMA:
        tile = a.load([first, step])
    else:
        tile = load_tile(a, rows, step + tl.arange(0, BK), D, D, False, D % BK != 0)
    return tile


@triton.jit
def _frozen_product(
    a, w, row, col, rows, cols, N: tl.constexpr, D: tl.constexpr,
    W_ROWS_ARE_COLUMNS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(0, D, BK):
        left = _input_tile(a, row, rows, step, D, BK, TMA)
        right = _weight_tile(w, col, cols, step, N, D, W_ROWS_ARE_COLUMNS, BK, TMA)
        acc = dot(left, right, acc, PRECISION)
    return acc


@triton.jit
def _store(
    acc, y, y_ptr, row, col, rows, inside, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    TMA: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    out = cast(acc, y_ptr.dtype.element_ty)
    if TMA:
        if HALVES:
            left, right = tl.split(tl.permute(tl.reshape(out, (BM, 2, BN // 2)), (0, 2, 1)))
            y.store([row, col], left)
            y.store([row, col + BN // 2], right)
        else:
            y.store([row, col], out)
    else:
        cols = col + tl.arange(0, BN)
        mask = inside[:, None]
        if N % BN != 0:
            mask = mask & (cols < N)[None, :]
        tl.store(y_ptr + rows[:, None] * N + cols[None, :], out, mask=mask)


@triton.jit
def _one_tile(
    tile, a, w, core_ptr, factor_ptr, bias_ptr, y, y_ptr, T,
    N: tl.constexpr, D: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BIAS: tl.constexpr,
    FORWARD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, TMA: tl.constexpr, HALVES: tl.constexpr, PDL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # GROUP row tiles share their column tiles in L2 before the walk moves on.
    COLUMN_TILES: tl.constexpr = (N + BN - 1) // BN
    group = tile // (GROUP * COLUMN_TILES)
    height = tl.minimum(tl.cdiv(T, BM) - group * GROUP, GROUP)
    within = tile % (GROUP * COLUMN_TILES)
    row = (group * GROUP + within % height) * BM
    col = (within // height) * BN

    rows = row + tl.arange(0, BM)
    inside = rows < T
    rows = tl.minimum(rows, T - 1).to(tl.int64)
    cols = col + tl.arange(0, BN)
    if N % BN != 0:
        cols = tl.minimum(cols, N - 1)
    acc = _frozen_product(a, w, row, col, rows, cols, N, D, FORWARD, BM, BN, BK, TMA, PRECISION)
    ranks = tl.arange(0, RP)
    if PDL:
        tl.extra.cuda.gdc_wait()
    core = tl.load(core_ptr + rows[:, None] * RP + ranks[None, :])
    factor = load_factor(factor_ptr, cols, ranks, N, R, RP, not FORWARD, False)
    acc = dot(core, tl.trans(cast(factor, core.dtype)), acc, PRECISION)
    if BIAS:
        acc += tl.load(bias_ptr + cols).to(tl.float32)[None, :]
    _store(acc, y, y_ptr, row, col, rows, inside, N, BM, BN, TMA, HALVES)


@triton.jit(do_not_specialize=["T"])
def gemm_kernel(
    a, w, core_ptr, factor_ptr, bias_ptr, y, y_ptr, T,
    N: tl.constexpr, D: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BIAS: tl.constexpr,
    FORWARD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, TMA: tl.constexpr, HALVES: tl.constexpr, PERSISTENT: tl.constexpr,
    SPECIALIZE: tl.constexpr, PDL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    if PERSISTENT:
        tiles = tl.cdiv(T, BM) * tl.cdiv(N, BN)
        for tile in tl.range(
            tl.program_id(0), tiles, tl.num_programs(0), flatten=not SPECIALIZE,
            warp_specialize=SPECIALIZE,
        ):  # fmt: skip
            _one_tile(
                tile, a, w, core_ptr, factor_ptr, bias_ptr, y, y_ptr, T, N, D, R, RP, BIAS,
                FORWARD, BM, BN, BK, GROUP, TMA, HALVES, PDL, PRECISION,
            )  # fmt: skip
    else:
        _one_tile(
            tl.program_id(0), a, w, core_ptr, factor_ptr, bias_ptr, y, y_ptr, T, N, D, R, RP, BIAS,
            FORWARD, BM, BN, BK, GROUP, TMA, HALVES, PDL, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "scale", "threshold", "kept"])
def owner_kernel(
    x, w, factor_in, mode_ptr, seed_ptr, factor_ptr, bias_ptr, y, y_ptr, z_ptr, T, scale, threshold,
    kept, N: tl.constexpr, D: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    BIAS: tl.constexpr, DENSE: tl.constexpr, DROPOUT: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr,
    HALVES: tl.constexpr, PRECISION: tl.constexpr, MODE_PRECISION: tl.constexpr,
):  # fmt: skip
    """COLS column tiles of one row tile: the first also computes z from the same tiles of x.

    No launch and no read of x for z alone; the price is R / BN more products in the first tile.
    """
    COLUMN_TILES: tl.constexpr = (N + BN - 1) // BN
    SHARES: tl.constexpr = (COLUMN_TILES + COLS - 1) // COLS
    row = tl.program_id(0) // SHARES * BM
    share = tl.program_id(0) % SHARES
    rows = row + tl.arange(0, BM)
    inside = rows < T
    rows = tl.minimum(rows, T - 1).to(tl.int64)
    ranks = tl.arange(0, RP)

    col = share * COLS * BN
    cols = col + tl.arange(0, BN)
    if N % BN != 0:
        cols = tl.minimum(cols, N - 1)
    acc = tl.zeros((BM, BN), tl.float32)
    z = tl.zeros((BM, RP), tl.float32)
    for step in range(0, D, BK):
        left = _input_tile(x, row, rows, step, D, BK, TMA)
        right = _weight_tile(w, col, cols, step, N, D, True, BK, TMA)
        acc = dot(left, right, acc, PRECISION)
        if TMA:
            down = tl.trans(factor_in.load([0, step]))
        else:
            inner = step + tl.arange(0, BK)
            down = load_factor(factor_in, inner, ranks, D, R, RP, True, D % BK != 0)
        z = dot(left, cast(down, left.dtype), z, PRECISION)
    if share == 0:
        mask = inside[:, None] & (ranks < R)[None, :]
        at = z_ptr + rows[:, None] * R + ranks[None, :]
        tl.store(at, cast(z, z_ptr.dtype.element_ty), mask=mask)
    core = core_of(
        z, mode_ptr, seed_ptr, rows, tl.cast(scale, tl.float32), threshold,
        tl.cast(kept, tl.float32), R, RP, DENSE, DROPOUT, MODE_PRECISION,
    )  # fmt: skip
    core = cast(core, y_ptr.dtype.element_ty)
    factor = load_factor(factor_ptr, cols, ranks, N, R, RP, False, False)
    acc = dot(core, tl.trans(cast(factor, core.dtype)), acc, PRECISION)
    if BIAS:
        acc += tl.load(bias_ptr + cols).to(tl.float32)[None, :]
    _store(acc, y, y_ptr, row, col, rows, inside, N, BM, BN, TMA, HALVES)

    for turn in range(1, COLS):
        col = (share * COLS + turn) * BN
        if col < N:
            cols = col + tl.arange(0, BN)
            if N % BN != 0:
                cols = tl.minimum(cols, N - 1)
            acc = _frozen_product(
                x, w, row, col, rows, cols, N, D, True, BM, BN, BK, TMA, PRECISION
            )
            factor = load_factor(factor_ptr, cols, ranks, N, R, RP, False, False)
            acc = dot(core, tl.trans(cast(factor, core.dtype)), acc, PRECISION)
            if BIAS:
                acc += tl.load(bias_ptr + cols).to(tl.float32)[None, :]
            _store(acc, y, y_ptr, row, col, rows, inside, N, BM, BN, TMA, HALVES)


def gemm(
    a: Tensor,
    weight: Tensor,
    core: Tensor,
    factor: Tensor,
    bias: Tensor | None,
    y: Tensor,
    *,
    forward: bool,
    tile: dict,
    precision: str,
    programs: int,
    overlap: bool = False,
) -> None:
    """``y = a weight^T + core factor^T + bias`` (forward) or ``y = a weight + core factor``.

    core is ``[T, RP]`` with zeros in the padded ranks; factor is factor_out ``[n, R]`` or factor_in
    ``[R, n]``. `tile`: bm, bn, bk, group, warps, stages, and as 0 or 1: tma, halves (store in two
    parts), persistent (on at most `programs` programs), specialize. `overlap`: launched beside the
    kernel that computes core.
    """
    (tokens, dim), wide = a.shape, y.shape[1]
    bm, bn, bk = tile["bm"], tile["bn"], tile["bk"]
    tma = bool(tile["tma"]) and all(_describable(t) for t in (a, weight, y))
    halves = bool(tile["halves"]) and tma
    blocks = triton.cdiv(tokens, bm) * triton.cdiv(wide, bn)
    persistent = bool(tile["persistent"])
    extra = {"launch_pdl": True} if overlap else {}
    gemm_kernel[(min(blocks, programs) if persistent else blocks,)](
        _describe(a, (bm, bk), tma), _describe(weight, (bn, bk) if forward else (bk, bn), tma),
        core, factor, core if bias is None else bias,
        _describe(y, (bm, bn // 2 if halves else bn), tma), y, tokens, N=wide, D=dim,
        R=factor.shape[1 if forward else 0], RP=core.shape[1], BIAS=bias is not None,
        FORWARD=forward, BM=bm, BN=bn, BK=bk, GROUP=tile["group"], TMA=tma, HALVES=halves,
        PERSISTENT=persistent, SPECIALIZE=bool(tile["specialize"]), PDL=overlap,
        PRECISION=precision, num_warps=tile["warps"], num_stages=tile["stages"],
        enable_fp_fusion=True, **extra,
    )  # fmt: skip


def gemm_with_projection(
    x: Tensor,
    weight: Tensor,
    factor_in: Tensor,
    factor_out: Tensor,
    mode: Tensor,
    bias: Tensor | None,
    seeds: Tensor | None,
    z: Tensor,
    y: Tensor,
    *,
    scale: float,
    threshold: int,
    kept: float,
    dropout: str,
    padded: int,
    tile: dict,
    precision: str,
) -> None:
    """y and z of one weight in one launch; factor_in in the dtype of x.

    `tile`: bm, bn, bk, cols (column tiles of one program), warps, stages, tma, halves.
    """
    (tokens, dim), wide = x.shape, y.shape[1]
    bm, bn, bk = tile["bm"], tile["bn"], tile["bk"]
    tma = bool(tile["tma"]) and all(_describable(t) for t in (x, weight, factor_in, y))
    halves = bool(tile["halves"]) and tma
    shares = triton.cdiv(triton.cdiv(wide, bn), tile["cols"])
    owner_kernel[(triton.cdiv(tokens, bm) * shares,)](
        _describe(x, (bm, bk), tma), _describe(weight, (bn, bk), tma),
        _describe(factor_in, (padded, bk), tma), mode, z if seeds is None else seeds, factor_out,
        z if bias is None else bias, _describe(y, (bm, bn // 2 if halves else bn), tma), y, z,
        tokens, scale, threshold, kept, N=wide, D=dim, R=z.shape[1], RP=padded,
        BIAS=bias is not None, DENSE=mode.ndim == 2, DROPOUT=dropout, BM=bm, BN=bn, BK=bk,
        COLS=tile["cols"], TMA=tma, HALVES=halves, PRECISION=precision,
        MODE_PRECISION=mode_precision(x.dtype), num_warps=tile["warps"], num_stages=tile["stages"],
        enable_fp_fusion=True,
    )  # fmt: skip


def _describable(tensor: Tensor) -> bool:
    """Whether the tensor memory accelerator can read it: 16-byte rows and base, Hopper or newer."""
    bytes_of_row = tensor.stride(0) * tensor.element_size()
    if bytes_of_row % 16 or tensor.data_ptr() % 16:
        return False
    return tensor.device.type != "cuda" or torch.cuda.get_device_capability(tensor.device) >= (9, 0)


def _describe(tensor: Tensor, block: tuple[int, int], tma: bool) -> Tensor | TensorDescriptor:
    return TensorDescriptor.from_tensor(tensor, list(block)) if tma else tensor
