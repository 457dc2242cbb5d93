"""Forward of the SwiGLU adapter: x is read from memory once, its second read comes from L2.

    z = rstd * (x W^T)           W: gate and down with the norm's weight already in them
    y = base + scale * (silu(z_gate) * z_down) up^T

The norm is folded in by linearity: rows are scaled by rstd after the products, so the normalised
stream never exists. A tile of rows is projected to the rank once per expert that occurs in it (one,
in nearly every tile) and expanded column block by column block, walking backwards, because the last
columns read are the likeliest to be in L2.

`fused` does both for a tile of rows. `project` and `expand` are its halves: for few rows, d is
split over programs and partial sums go through memory; for a large rank, z is tiled.
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmadapt.kernels.common.triton_dot import dot
from mmadapt.kernels.swiglu_adapter.triton_tiles import (
    block,
    diagonal,
    load_tile,
    padded_experts,
    padded_rank,
    pick,
    place,
    route,
    sigmoid,
    stages_within,
    store_tile,
    tile_rows,
)


@triton.jit
def _project(
    x_ptr, gate_ptr, down_ptr, rows, ranks, ids, low, high, first,
    D: tl.constexpr, M: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr,
    BR: tl.constexpr, BK: tl.constexpr, length, EVEN_D: tl.constexpr,
    EVEN_M: tl.constexpr, ROUTED: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, WIDE_STAGES: tl.constexpr,
):  # fmt: skip
    """x gate^T and x down^T ``[BM, BR]`` over columns first..first+length, and sums of squares."""
    if not ROUTED:
        return _products(
            x_ptr, gate_ptr, down_ptr, rows, ranks, ranks < M, first,
            D, BM, BR, BK, length, EVEN_D, EVEN_M, NORM, PRECISION, STAGES,
        )  # fmt: skip
    zg = tl.zeros((BM, BR), tl.float32)
    zd = tl.zeros((BM, BR), tl.float32)
    squares = tl.zeros((BM,), tl.float32)
    if low == high:
        only = tl.maximum(low, 0)
        zg, zd, squares = _products(
            x_ptr, gate_ptr, down_ptr, rows, only * M + ranks, ranks < M, first,
            D, BM, BR, BK, length, EVEN_D, EVEN_M, NORM, PRECISION, STAGES,
        )  # fmt: skip
        routed = (ids >= 0)[:, None]
        zg = tl.where(routed, zg, 0.0)
        zd = tl.where(routed, zd, 0.0)
    else:
        if EP > 0:
            flat = tl.arange(0, EP * BR)
            owner, rank = flat // BR, flat % BR
            all_g, all_d, squares = _products(
                x_ptr, gate_ptr, down_ptr, rows, owner * M + rank, (rank < M) & (owner < E), first,
                D, BM, EP * BR, BK, length, EVEN_D, EVEN_M and EP == E, NORM, PRECISION,
                WIDE_STAGES,
            )  # fmt: skip
            zg = pick(all_g, ids, EP, BM, BR)
            zd = pick(all_d, ids, EP, BM, BR)
        else:
            for e in range(E):
                if (e >= low) & (e <= high):
                    sum_g, sum_d, squares = _products(
                        x_ptr, gate_ptr, down_ptr, rows, e * M + ranks, ranks < M, first,
                        D, BM, BR, BK, length, EVEN_D, EVEN_M, NORM, PRECISION, STAGES,
                    )  # fmt: skip
                    mine = (ids == e)[:, None]
                    zg = tl.where(mine, sum_g, zg)
                    zd = tl.where(mine, sum_d, zd)
    return zg, zd, squares


@triton.jit
def _products(
    x_ptr, gate_ptr, down_ptr, rows, weight_rows, weight_ok, first,
    D: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, length,
    EVEN_D: tl.constexpr, EVEN_M: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """x times the `weight_rows` of gate and of down, ``[BM, BC]`` each, and sums of squares.

    Half-precision x stays in shared memory, where the tensor cores read it: sums of squares are the
    diagonal of x x^T. With x in registers as well, the second product of this loop read registers
    that were being overwritten (Triton 3.6 on Hopper), and the loop was not faster.
    """
    HALF: tl.constexpr = x_ptr.dtype.element_ty != tl.float32
    zg = tl.zeros((BM, BC), tl.float32)
    zd = tl.zeros((BM, BC), tl.float32)
    squares = tl.zeros((BM,), tl.float32)
    gram = tl.zeros((BM, BM if HALF and NORM else 1), tl.float32)
    for k in tl.range(0, length, BK, num_stages=STAGES):
        cols = first + k + tl.arange(0, BK)
        ok = cols < D
        x = load_tile(x_ptr, rows, cols, D, rows >= 0, ok, False, not EVEN_D)
        wg = load_tile(gate_ptr, weight_rows, cols, D, weight_ok, ok, not EVEN_M, not EVEN_D)
        wd = load_tile(down_ptr, weight_rows, cols, D, weight_ok, ok, not EVEN_M, not EVEN_D)
        zg = dot(x, tl.trans(wg.to(x.dtype)), zg, PRECISION)
        zd = dot(x, tl.trans(wd.to(x.dtype)), zd, PRECISION)
        if NORM:
            if HALF:
                gram = dot(x, tl.trans(x), gram, PRECISION)
            else:
                squares += _squares_of_tile(x_ptr, rows, cols, D, EVEN_D)
    if NORM and HALF:
        squares = diagonal(gram, BM)
    return zg, zd, squares


@triton.jit
def _squares_of_tile(x_ptr, rows, cols, D: tl.constexpr, EVEN_D: tl.constexpr):
    at = x_ptr + rows[:, None] * D + cols[None, :]
    # Another eviction policy makes it another load, apart from the one that feeds the products.
    if EVEN_D:
        x = tl.load(at, eviction_policy="evict_last")
    else:
        x = tl.load(at, mask=(cols < D)[None, :], other=0.0, eviction_policy="evict_last")
    return tl.sum(x * x, 1)


@triton.jit
def _activate(
    zg, zd, squares, ids, eps, zg_ptr, zd_ptr, rstd_ptr, rows, ranks, keep,
    D: tl.constexpr, M: tl.constexpr, EVEN_M: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """h = silu(z_gate) z_down in fp32, and rstd; saves z and rstd of rows in `keep`."""
    rstd = tl.zeros_like(squares) + 1.0
    if NORM:
        rstd = 1.0 / tl.sqrt(squares / D + eps)
        tl.store(rstd_ptr + rows, rstd, mask=keep)
        zg = zg * rstd[:, None]
        zd = zd * rstd[:, None]
    store_tile(zg_ptr, zg, rows, ranks, M, keep, M, not EVEN_M)
    store_tile(zd_ptr, zd, rows, ranks, M, keep, M, not EVEN_M)
    return zg * sigmoid(zg) * zd, rstd


@triton.jit
def _expand(
    x_ptr, up_ptr, weight_ptr, y_ptr, h, rstd, rows, inside, ids, low, high, first, scale,
    D: tl.constexpr, M: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr,
    MP: tl.constexpr, BN: tl.constexpr, length, EVEN_D: tl.constexpr,
    EVEN_M: tl.constexpr, ROUTED: tl.constexpr, SHARED_UP: tl.constexpr, RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, WIDE_STAGES: tl.constexpr,
):  # fmt: skip
    """y = base + scale * h up^T for columns first..first+length."""
    ranks = tl.arange(0, MP)
    if ROUTED and not SHARED_UP:
        if low == high:
            _columns(
                x_ptr, up_ptr + tl.maximum(low, 0) * D * M, weight_ptr, y_ptr, h, ranks,
                ranks < M, rstd, rows, inside, ids, first, scale,
                D, M, BN, length, EVEN_D, EVEN_M, ROUTED, RESIDUAL, PRECISION, STAGES,
            )  # fmt: skip
        else:
            if EP > 0:
                flat = tl.arange(0, EP * MP)
                owner, rank = flat // MP, flat % MP
                _columns(
                    x_ptr, up_ptr, weight_ptr, y_ptr, place(h, ids, EP, BM, MP),
                    owner * D * M + rank, (rank < M) & (owner < E), rstd, rows, inside, ids,
                    first, scale, D, M, BN,
                    length, EVEN_D, EVEN_M and EP == E, ROUTED, RESIDUAL, PRECISION,
                    WIDE_STAGES,
                )  # fmt: skip
            else:
                half = h.to(x_ptr.dtype.element_ty)
                for c in tl.range(0, length, BN, num_stages=1):
                    cols = first + c + tl.arange(0, BN)
                    acc = tl.zeros((BM, BN), tl.float32)
                    for e in range(E):
                        if (e >= low) & (e <= high):
                            w = load_tile(
                                up_ptr + e * D * M, cols, ranks, M, cols < D, ranks < M,
                                not EVEN_D, not EVEN_M,
                            ).to(half.dtype)  # fmt: skip
                            part = dot(half, tl.trans(w), None, PRECISION)
                            acc = tl.where((ids == e)[:, None], part, acc)
                    _write(
                        x_ptr, weight_ptr, y_ptr, acc, rstd, rows, inside, ids, cols, scale,
                        D, EVEN_D, ROUTED, RESIDUAL,
                    )  # fmt: skip
    else:
        _columns(
            x_ptr, up_ptr, weight_ptr, y_ptr, h, ranks, ranks < M, rstd, rows, inside, ids,
            first, scale, D, M, BN, length, EVEN_D, EVEN_M, ROUTED, RESIDUAL, PRECISION, STAGES,
        )  # fmt: skip


@triton.jit
def _columns(
    x_ptr, up_ptr, weight_ptr, y_ptr, h, weight_cols, weight_ok, rstd, rows, inside, ids,
    first, scale,
    D: tl.constexpr, M: tl.constexpr, BN: tl.constexpr, length,
    EVEN_D: tl.constexpr, EVEN_M: tl.constexpr, ROUTED: tl.constexpr, RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All column blocks, the last first; h times the `weight_cols` of up."""
    hidden = h.to(x_ptr.dtype.element_ty)
    last = (length + BN - 1) // BN * BN - BN
    for c in tl.range(0, length, BN, num_stages=STAGES):
        cols = first + (last - c) + tl.arange(0, BN)
        w = load_tile(up_ptr, cols, weight_cols, M, cols < D, weight_ok, not EVEN_D, not EVEN_M)
        acc = dot(hidden, tl.trans(w.to(hidden.dtype)), None, PRECISION)
        _write(
            x_ptr, weight_ptr, y_ptr, acc, rstd, rows, inside, ids, cols, scale,
            D, EVEN_D, ROUTED, RESIDUAL,
        )  # fmt: skip


@triton.jit
def _write(
    x_ptr, weight_ptr, y_ptr, acc, rstd, rows, inside, ids, cols, scale,
    D: tl.constexpr, EVEN_D: tl.constexpr, ROUTED: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    delta = acc * scale
    if ROUTED:  # rows without expert are the base, whatever the weights hold
        delta = tl.where((ids >= 0)[:, None], delta, 0.0)
    if RESIDUAL == "none":
        y = delta
    else:
        base = load_tile(x_ptr, rows, cols, D, inside, cols < D, False, not EVEN_D)
        base = base.to(tl.float32)
        if RESIDUAL == "norm":
            if EVEN_D:
                weight = tl.load(weight_ptr + cols)
            else:
                weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0)
            base = base * rstd[:, None] * weight.to(tl.float32)[None, :]
        y = base + delta
    store_tile(y_ptr, y, rows, cols, D, inside, D, not EVEN_D)


@triton.jit(do_not_specialize=["T"])
def fused_forward_kernel(
    x_ptr, gate_ptr, down_ptr, up_ptr, expert_ptr, weight_ptr, y_ptr, zg_ptr, zd_ptr, rstd_ptr,
    T, scale, eps, length,
    D: tl.constexpr, M: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr,
    MP: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_M: tl.constexpr, ROUTED: tl.constexpr, SHARED_UP: tl.constexpr, NORM: tl.constexpr,
    RESIDUAL: tl.constexpr, PRECISION: tl.constexpr, STAGES_K: tl.constexpr,
    STAGES_N: tl.constexpr, WIDE_K: tl.constexpr, WIDE_N: tl.constexpr,
):  # fmt: skip
    rows, inside = tile_rows(T, BM)
    ids, low, high = route(expert_ptr, rows, inside, E, ROUTED)
    ranks = tl.arange(0, MP)
    zg, zd, squares = _project(
        x_ptr, gate_ptr, down_ptr, rows, ranks, ids, low, high, 0,
        D, M, E, EP, BM, MP, BK, length, EVEN_K, EVEN_M, ROUTED, NORM, PRECISION, STAGES_K, WIDE_K,
    )  # fmt: skip
    h, rstd = _activate(
        zg, zd, squares, ids, eps, zg_ptr, zd_ptr, rstd_ptr, rows, ranks, inside,
        D, M, EVEN_M, NORM,
    )  # fmt: skip
    _expand(
        x_ptr, up_ptr, weight_ptr, y_ptr, h, rstd, rows, inside, ids, low, high, 0, scale,
        D, M, E, EP, BM, MP, BN, length, EVEN_N, EVEN_M, ROUTED, SHARED_UP, RESIDUAL, PRECISION,
        STAGES_N, WIDE_N,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def project_forward_kernel(
    x_ptr, gate_ptr, down_ptr, expert_ptr, zg_ptr, zd_ptr, squares_ptr, h_ptr, rstd_ptr, T, eps,
    D: tl.constexpr, M: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr,
    BR: tl.constexpr, BK: tl.constexpr, length, SPLITS: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_M: tl.constexpr, ROUTED: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, WIDE_STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, rank blocks, splits of d). One split finishes z and h; several write
    fp32 partial sums ``[SPLITS, T, M]`` and squares ``[SPLITS, T]``."""
    rows, inside = tile_rows(T, BM)
    ids, low, high = route(expert_ptr, rows, inside, E, ROUTED)
    split = tl.program_id(2)
    ranks = tl.program_id(1) * BR + tl.arange(0, BR)
    zg, zd, squares = _project(
        x_ptr, gate_ptr, down_ptr, rows, ranks, ids, low, high, split * length,
        D, M, E, EP, BM, BR, BK, length, EVEN_D, EVEN_M, ROUTED, NORM, PRECISION, STAGES,
        WIDE_STAGES,
    )  # fmt: skip
    if SPLITS == 1:
        h, _ = _activate(
            zg, zd, squares, ids, eps, zg_ptr, zd_ptr, rstd_ptr, rows, ranks, inside,
            D, M, EVEN_M, NORM,
        )  # fmt: skip
        store_tile(h_ptr, h, rows, ranks, M, inside, M, not EVEN_M)
    else:
        row_of_split = split.to(tl.int64) * T + rows
        store_tile(zg_ptr, zg, row_of_split, ranks, M, inside, M, not EVEN_M)
        store_tile(zd_ptr, zd, row_of_split, ranks, M, inside, M, not EVEN_M)
        if NORM:
            tl.store(squares_ptr + row_of_split, squares, mask=inside)


@triton.jit(do_not_specialize=["T"])
def expand_forward_kernel(
    x_ptr, up_ptr, expert_ptr, weight_ptr, part_g_ptr, part_d_ptr, squares_ptr, h_ptr,
    y_ptr, zg_ptr, zd_ptr, rstd_ptr, T, scale, eps,
    D: tl.constexpr, M: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr,
    MP: tl.constexpr, BN: tl.constexpr, length, SPLITS: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_M: tl.constexpr, ROUTED: tl.constexpr, SHARED_UP: tl.constexpr, NORM: tl.constexpr,
    RESIDUAL: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    WIDE_STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, column groups of length). Sums partials in ascending order, or takes h."""
    rows, inside = tile_rows(T, BM)
    ids, low, high = route(expert_ptr, rows, inside, E, ROUTED)
    ranks = tl.arange(0, MP)
    if SPLITS == 1:
        h = load_tile(h_ptr, rows, ranks, M, inside, ranks < M, False, not EVEN_M)
        rstd = tl.zeros((BM,), tl.float32) + 1.0
        if NORM:
            rstd = tl.load(rstd_ptr + rows)
    else:
        zg = tl.zeros((BM, MP), tl.float32)
        zd = tl.zeros((BM, MP), tl.float32)
        squares = tl.zeros((BM,), tl.float32)
        for s in tl.static_range(SPLITS):
            of_split = rows + tl.cast(T, tl.int64) * s
            zg += load_tile(part_g_ptr, of_split, ranks, M, inside, ranks < M, False, not EVEN_M)
            zd += load_tile(part_d_ptr, of_split, ranks, M, inside, ranks < M, False, not EVEN_M)
            if NORM:
                squares += tl.load(squares_ptr + of_split)
        keep = inside & (ids * 0 + tl.program_id(1) == 0)
        h, rstd = _activate(
            zg, zd, squares, ids, eps, zg_ptr, zd_ptr, rstd_ptr, rows, ranks, keep,
            D, M, EVEN_M, NORM,
        )  # fmt: skip
    _expand(
        x_ptr, up_ptr, weight_ptr, y_ptr, h, rstd, rows, inside, ids, low, high,
        tl.program_id(1) * length, scale, D, M, E, EP, BM, MP, BN, length, EVEN_D, EVEN_M,
        ROUTED, SHARED_UP, RESIDUAL, PRECISION, STAGES, WIDE_STAGES,
    )  # fmt: skip


def launch_forward(
    x: Tensor,
    gate: Tensor,
    down: Tensor,
    up: Tensor,
    expert: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    residual: str,
    scale: float,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
    config: Mapping[str, int],
    precision: str,
) -> None:
    """Fill `outputs` (y, zg, zd, rstd). `gate` and `down` hold the norm's weight already.

    Shapes as in `mmadapt.ops.swiglu_adapter` with x ``[T, d]``, T > 0, everything contiguous;
    `config` as in `mmadapt.ops._backends.triton.swiglu_adapter`.
    """
    y, zg, zd, rstd = outputs
    (tokens, dim), (experts, rank) = x.shape, gate.shape[:2]
    padded = padded_rank(rank)
    flags = {
        "D": dim,
        "M": rank,
        "E": experts,
        "EP": padded_experts(experts, rank),
        "BM": config["BM"],
        "EVEN_M": padded == rank,
        "ROUTED": expert is not None,
        "NORM": norm_weight is not None,
        "PRECISION": precision,
        "num_warps": config["warps"],
        "enable_fp_fusion": True,
    }
    expanding = {"MP": padded, "SHARED_UP": up.shape[0] == 1, "RESIDUAL": residual}
    row_tiles = triton.cdiv(tokens, config["BM"])
    bk, bn = min(config["BK"], block(dim)), min(config["BN"], block(dim))
    wide = padded * padded_experts(experts, rank)
    per_k, per_n = bk * x.element_size(), bn * x.element_size()
    base = 0 if residual == "none" else config["BM"]
    stages_k = stages_within(config["stages_k"], (config["BM"] + 2 * padded) * per_k)
    stages_n = stages_within(config["stages_n"], (base + padded) * per_n)
    for_wide = 160 if wide <= 64 else 112  # picking and placing experts needs the rest
    wide_k = stages_within(config["stages_k"], (config["BM"] + 2 * wide) * per_k, for_wide)
    wide_n = stages_within(config["stages_n"], (base + wide) * per_n, for_wide)
    if config["fused"]:
        fused_forward_kernel[(row_tiles,)](
            x, gate, down, up, expert, norm_weight, y, zg, zd, rstd, tokens, scale, eps,
            BK=bk, BN=bn, EVEN_K=dim % bk == 0, EVEN_N=dim % bn == 0, length=dim,
            **expanding, **flags,
            STAGES_K=stages_k, STAGES_N=stages_n,
            WIDE_K=wide_k, WIDE_N=wide_n,
        )  # fmt: skip
        return
    splits = config["splits"]
    h = x.new_empty(tokens if splits == 1 else 0, rank)
    part_g, part_d = zg, zd
    squares = rstd
    if splits > 1:
        part_g, part_d = x.new_empty(2, splits, tokens, rank, dtype=torch.float32)
        squares = x.new_empty(splits if norm_weight is not None else 0, tokens, dtype=torch.float32)
    length = triton.cdiv(triton.cdiv(dim, splits), bk) * bk
    block_rank = min(config["BR"], padded)
    side_by_side = flags["EP"] if block_rank == padded else 0
    project_forward_kernel[(row_tiles, padded // block_rank, splits)](
        x, gate, down, expert, part_g, part_d, squares, h, rstd, tokens, eps,
        BR=block_rank, BK=bk, length=length, SPLITS=splits, EVEN_D=length * splits == dim,
        STAGES=stages_k, WIDE_STAGES=wide_k, **{**flags, "EP": side_by_side},
    )  # fmt: skip
    length = triton.cdiv(triton.cdiv(dim, config["groups"]), bn) * bn
    groups = triton.cdiv(dim, length)
    expand_forward_kernel[(row_tiles, groups)](
        x, up, expert, norm_weight, part_g, part_d, squares, h, y, zg, zd, rstd,
        tokens, scale, eps, BN=bn, length=length, SPLITS=splits, EVEN_D=length * groups == dim,
        STAGES=stages_n, WIDE_STAGES=wide_n, **expanding, **flags,
    )  # fmt: skip
