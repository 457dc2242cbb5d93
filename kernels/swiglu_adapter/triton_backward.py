"""Backward of the SwiGLU adapter through its input, and the factors of its weight gradients.

    dh  = scale * (dy up)                       from z, saved: dz_gate, dz_down by the product rule
    dx  = base's dy + rstd * (dz W) - x * rstd^2 / d * (sum_j dz_j z_j + rstd * sum_i dy_i g_i x_i)

W: gate and down with the norm's weight g in them; the last sum only if the base is the normalised
stream. The row reduction over d that the norm needs is a sum over the rank, because
``sum_i (dz W)_i x_i = sum_j dz_j z_j / rstd``. Writes dz * rstd and scale * h ``[T, M]``, whose
products with x and dy are the weight gradients (triton_weights.py).

Same shape as the forward: `fused`, or its halves `project` and `expand`. For large ranks the second
half is two kernels: `activate`, and `columns`, which tiles dz too.
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmadapt.kernels.common.triton_dot import dot
from mmadapt.kernels.swiglu_adapter.triton_tiles import (
    block,
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
    dy_ptr, up_ptr, x_ptr, weight_ptr, rows, ranks, ids, low, high, first,
    D: tl.constexpr, M: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr,
    BR: tl.constexpr, BK: tl.constexpr, length, EVEN_D: tl.constexpr,
    EVEN_M: tl.constexpr, ROUTED: tl.constexpr, SHARED_UP: tl.constexpr, SIDE: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, WIDE_STAGES: tl.constexpr,
):  # fmt: skip
    """dy up ``[BM, BR]`` over columns first..first+length; with SIDE also sum of dy * x * g."""
    if not ROUTED or SHARED_UP:
        return _product(
            dy_ptr, up_ptr, x_ptr, weight_ptr, rows, ranks, ranks < M, first,
            D, M, BM, BR, BK, length, EVEN_D, EVEN_M, SIDE, PRECISION, STAGES,
        )  # fmt: skip
    dh = tl.zeros((BM, BR), tl.float32)
    side = tl.zeros((BM,), tl.float32)
    if low == high:
        dh, side = _product(
            dy_ptr, up_ptr + tl.maximum(low, 0) * D * M, x_ptr, weight_ptr, rows, ranks, ranks < M,
            first, D, M, BM, BR, BK, length, EVEN_D, EVEN_M, SIDE, PRECISION, STAGES,
        )  # fmt: skip
    else:
        if EP > 0:
            flat = tl.arange(0, EP * BR)
            owner, rank = flat // BR, flat % BR
            all_dh, side = _product(
                dy_ptr, up_ptr, x_ptr, weight_ptr, rows, owner * D * M + rank,
                (rank < M) & (owner < E), first, D, M, BM, EP * BR, BK, length, EVEN_D,
                EVEN_M and EP == E, SIDE, PRECISION, WIDE_STAGES,
            )  # fmt: skip
            dh = pick(all_dh, ids, EP, BM, BR)
        else:
            for e in range(E):
                if (e >= low) & (e <= high):
                    part, side = _product(
                        dy_ptr, up_ptr + e * D * M, x_ptr, weight_ptr, rows, ranks, ranks < M,
                        first, D, M, BM, BR, BK, length, EVEN_D, EVEN_M, SIDE, PRECISION, STAGES,
                    )  # fmt: skip
                    dh = tl.where((ids == e)[:, None], part, dh)
    return dh, side


@triton.jit
def _product(
    dy_ptr, up_ptr, x_ptr, weight_ptr, rows, weight_cols, weight_ok, first,
    D: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
    length, EVEN_D: tl.constexpr, EVEN_M: tl.constexpr, SIDE: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dy times the `weight_cols` of up, ``[BM, BC]``."""
    dh = tl.zeros((BM, BC), tl.float32)
    side = tl.zeros((BM,), tl.float32)
    for k in tl.range(0, length, BK, num_stages=STAGES):
        cols = first + k + tl.arange(0, BK)
        ok = cols < D
        dy = load_tile(dy_ptr, rows, cols, D, rows >= 0, ok, False, not EVEN_D)
        w = load_tile(up_ptr, cols, weight_cols, M, ok, weight_ok, not EVEN_D, not EVEN_M)
        dh = dot(dy, w.to(dy.dtype), dh, PRECISION)
        if SIDE:
            side += _side_of_tile(dy_ptr, x_ptr, weight_ptr, rows, cols, D, EVEN_D)
    return dh, side


@triton.jit
def _side_of_tile(dy_ptr, x_ptr, weight_ptr, rows, cols, D: tl.constexpr, EVEN_D: tl.constexpr):
    at = rows[:, None] * D + cols[None, :]
    # dy is loaded again, under another eviction policy so that the compiler keeps the loads apart:
    # what a product reads asynchronously must not be in registers too (see triton_forward.py).
    if EVEN_D:
        x = tl.load(x_ptr + at)
        dy = tl.load(dy_ptr + at, eviction_policy="evict_last")
    else:
        x = tl.load(x_ptr + at, mask=(cols < D)[None, :], other=0.0)
        dy = tl.load(dy_ptr + at, mask=(cols < D)[None, :], other=0.0, eviction_policy="evict_last")
    weight = _weight(weight_ptr, cols, D, EVEN_D)
    return tl.sum(dy.to(tl.float32) * x.to(tl.float32) * weight[None, :], 1)


@triton.jit
def _weight(weight_ptr, cols, D: tl.constexpr, EVEN_D: tl.constexpr):
    if EVEN_D:
        return tl.load(weight_ptr + cols).to(tl.float32)
    return tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)


@triton.jit
def _save(
    ptr, tile, rows, ranks, ids, keep, M: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    BM: tl.constexpr, MP: tl.constexpr, EVEN_M: tl.constexpr,
):  # fmt: skip
    """Rows of ``[T, M]``, or with EP of ``[T, E * M]``: the own expert's columns, else zeros."""
    if EP > 0:
        flat = tl.arange(0, EP * MP)
        owner, rank = flat // MP, flat % MP
        inside = keep[:, None] & ((rank < M) & (owner < E))[None, :]
        at = ptr + rows[:, None] * (E * M) + (owner * M + rank)[None, :]
        tl.store(at, place(tile, ids, EP, BM, MP).to(ptr.dtype.element_ty), mask=inside)
    else:
        store_tile(ptr, tile, rows, ranks, M, keep, M, not EVEN_M)


@triton.jit
def _activate(
    dh, zg_ptr, zd_ptr, rstd_ptr, dzg_ptr, dzd_ptr, h_ptr, rows, ranks, keep, ids, scale,
    M: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, MP: tl.constexpr,
    EVEN_M: tl.constexpr, ROUTED: tl.constexpr, SHARED_UP: tl.constexpr, NORM: tl.constexpr,
    SAVE_DZ: tl.constexpr, SAVE_H: tl.constexpr,
):  # fmt: skip
    """dz of gate and down, and sum_j dz_j z_j; saves dz * rstd and scale * h of rows in `keep`."""
    zg = load_tile(zg_ptr, rows, ranks, M, keep, ranks < M, False, not EVEN_M).to(tl.float32)
    zd = load_tile(zd_ptr, rows, ranks, M, keep, ranks < M, False, not EVEN_M).to(tl.float32)
    dh = dh * scale
    if ROUTED:  # dy may hold anything where no expert is at work, and z is 0
        dh = tl.where((ids >= 0)[:, None], dh, 0.0)
    sig = sigmoid(zg)
    silu = zg * sig
    dzd = dh * silu
    dzg = dh * zd * sig * (1.0 + zg * (1.0 - sig))
    dot_z = tl.sum(dzg * zg + dzd * zd, 1)
    if SAVE_DZ:
        rstd = tl.zeros_like(dot_z) + 1.0
        if NORM:
            rstd = tl.load(rstd_ptr + rows)
        _save(dzg_ptr, dzg * rstd[:, None], rows, ranks, ids, keep, M, E, EP, BM, MP, EVEN_M)
        _save(dzd_ptr, dzd * rstd[:, None], rows, ranks, ids, keep, M, E, EP, BM, MP, EVEN_M)
    if SAVE_H:
        _save(
            h_ptr, silu * zd * scale, rows, ranks, ids, keep,
            M, E, 0 if SHARED_UP else EP, BM, MP, EVEN_M,
        )  # fmt: skip
    return dzg, dzd, dot_z


@triton.jit
def _expand(
    dy_ptr, x_ptr, gate_ptr, down_ptr, weight_ptr, rstd_ptr, dx_ptr, dzg, dzd, dot_z, side,
    rows, inside, ids, low, high, first,
    D: tl.constexpr, M: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr,
    MP: tl.constexpr, BN: tl.constexpr, length, EVEN_D: tl.constexpr,
    EVEN_M: tl.constexpr, ROUTED: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, WIDE_STAGES: tl.constexpr,
):  # fmt: skip
    """dx for columns first..first+length."""
    ranks = tl.arange(0, MP)
    rstd = tl.zeros((BM,), tl.float32) + 1.0
    pull = tl.zeros((BM,), tl.float32)
    if NORM:
        rstd = tl.load(rstd_ptr + rows)
        pull = rstd * rstd / D * (dot_z + rstd * side)
    if ROUTED:
        if low == high:
            _columns(
                dy_ptr, x_ptr, gate_ptr, down_ptr, weight_ptr, dx_ptr, dzg, dzd,
                tl.maximum(low, 0) * M + ranks, ranks < M, rstd, pull, rows, inside, ids, first,
                D, BN, length, EVEN_D, EVEN_M, ROUTED, NORM, RESIDUAL, PRECISION, STAGES,
            )  # fmt: skip
        else:
            if EP > 0:
                flat = tl.arange(0, EP * MP)
                owner, rank = flat // MP, flat % MP
                _columns(
                    dy_ptr, x_ptr, gate_ptr, down_ptr, weight_ptr, dx_ptr,
                    place(dzg, ids, EP, BM, MP), place(dzd, ids, EP, BM, MP), owner * M + rank,
                    (rank < M) & (owner < E), rstd, pull, rows, inside, ids, first, D, BN, length,
                    EVEN_D, EVEN_M and EP == E, ROUTED, NORM, RESIDUAL, PRECISION,
                    WIDE_STAGES,
                )  # fmt: skip
            else:
                half_g = dzg.to(dy_ptr.dtype.element_ty)
                half_d = dzd.to(dy_ptr.dtype.element_ty)
                for c in tl.range(0, length, BN, num_stages=1):
                    cols = first + c + tl.arange(0, BN)
                    acc = tl.zeros((BM, BN), tl.float32)
                    for e in range(E):
                        if (e >= low) & (e <= high):
                            part = _product_of_z(
                                gate_ptr, down_ptr, half_g, half_d, e * M + ranks, ranks < M, cols,
                                D, EVEN_D, EVEN_M, PRECISION,
                            )  # fmt: skip
                            acc = tl.where((ids == e)[:, None], part, acc)
                    _write(
                        dy_ptr, x_ptr, weight_ptr, dx_ptr, acc, rstd, rstd, pull, rows, inside,
                        ids, cols,
                        D, EVEN_D, ROUTED, NORM, RESIDUAL,
                    )  # fmt: skip
    else:
        _columns(
            dy_ptr, x_ptr, gate_ptr, down_ptr, weight_ptr, dx_ptr, dzg, dzd, ranks, ranks < M,
            rstd, pull, rows, inside, ids, first,
            D, BN, length, EVEN_D, EVEN_M, ROUTED, NORM, RESIDUAL, PRECISION, STAGES,
        )  # fmt: skip


@triton.jit
def _columns(
    dy_ptr, x_ptr, gate_ptr, down_ptr, weight_ptr, dx_ptr, dzg, dzd, weight_rows, weight_ok,
    rstd, pull, rows, inside, ids, first,
    D: tl.constexpr, BN: tl.constexpr, length, EVEN_D: tl.constexpr,
    EVEN_M: tl.constexpr, ROUTED: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All column blocks, the last first; dz times the `weight_rows` of gate and down."""
    dzg = dzg.to(dy_ptr.dtype.element_ty)
    dzd = dzd.to(dy_ptr.dtype.element_ty)
    last = (length + BN - 1) // BN * BN - BN
    for c in tl.range(0, length, BN, num_stages=STAGES):
        cols = first + (last - c) + tl.arange(0, BN)
        acc = _product_of_z(
            gate_ptr, down_ptr, dzg, dzd, weight_rows, weight_ok, cols,
            D, EVEN_D, EVEN_M, PRECISION,
        )  # fmt: skip
        _write(
            dy_ptr, x_ptr, weight_ptr, dx_ptr, acc, rstd, rstd, pull, rows, inside, ids, cols,
            D, EVEN_D, ROUTED, NORM, RESIDUAL,
        )  # fmt: skip


@triton.jit
def _product_of_z(
    gate_ptr, down_ptr, dzg, dzd, weight_rows, weight_ok, cols,
    D: tl.constexpr, EVEN_D: tl.constexpr, EVEN_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dz_gate gate + dz_down down for a block of columns."""
    ok = cols < D
    wg = load_tile(gate_ptr, weight_rows, cols, D, weight_ok, ok, not EVEN_M, not EVEN_D)
    wd = load_tile(down_ptr, weight_rows, cols, D, weight_ok, ok, not EVEN_M, not EVEN_D)
    acc = dot(dzg, wg.to(dzg.dtype), None, PRECISION)
    return dot(dzd, wd.to(dzg.dtype), acc, PRECISION)


@triton.jit
def _write(
    dy_ptr, x_ptr, weight_ptr, dx_ptr, acc, gain, rstd, pull, rows, inside, ids, cols,
    D: tl.constexpr, EVEN_D: tl.constexpr, ROUTED: tl.constexpr, NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
):  # fmt: skip
    if ROUTED:
        acc = tl.where((ids >= 0)[:, None], acc, 0.0)
    dx = acc
    if NORM:
        x = load_tile(x_ptr, rows, cols, D, rows >= 0, cols < D, False, not EVEN_D).to(tl.float32)
        dx = gain[:, None] * acc - x * pull[:, None]
    if RESIDUAL != "none":
        dy = load_tile(dy_ptr, rows, cols, D, inside, cols < D, False, not EVEN_D)
        dy = dy.to(tl.float32)
        if RESIDUAL == "norm":
            dy = dy * rstd[:, None] * _weight(weight_ptr, cols, D, EVEN_D)[None, :]
        dx += dy
    store_tile(dx_ptr, dx, rows, cols, D, inside, D, not EVEN_D)


@triton.jit(do_not_specialize=["T"])
def fused_backward_kernel(
    dy_ptr, x_ptr, gate_ptr, down_ptr, up_ptr, expert_ptr, weight_ptr, zg_ptr, zd_ptr, rstd_ptr,
    dx_ptr, dzg_ptr, dzd_ptr, h_ptr, T, scale, length,
    D: tl.constexpr, M: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr,
    MP: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_M: tl.constexpr, ROUTED: tl.constexpr, SHARED_UP: tl.constexpr, NORM: tl.constexpr,
    RESIDUAL: tl.constexpr, NEED_DX: tl.constexpr, SAVE_DZ: tl.constexpr, SAVE_H: tl.constexpr,
    PRECISION: tl.constexpr, STAGES_K: tl.constexpr, STAGES_N: tl.constexpr,
    WIDE_K: tl.constexpr, WIDE_N: tl.constexpr,
):  # fmt: skip
    rows, inside = tile_rows(T, BM)
    ids, low, high = route(expert_ptr, rows, inside, E, ROUTED)
    ranks = tl.arange(0, MP)
    dh, side = _project(
        dy_ptr, up_ptr, x_ptr, weight_ptr, rows, ranks, ids, low, high, 0,
        D, M, E, EP, BM, MP, BK, length, EVEN_K, EVEN_M, ROUTED, SHARED_UP,
        RESIDUAL == "norm" and NEED_DX, PRECISION, STAGES_K, WIDE_K,
    )  # fmt: skip
    dzg, dzd, dot_z = _activate(
        dh, zg_ptr, zd_ptr, rstd_ptr, dzg_ptr, dzd_ptr, h_ptr, rows, ranks, inside, ids, scale,
        M, E, EP, BM, MP, EVEN_M, ROUTED, SHARED_UP, NORM, SAVE_DZ, SAVE_H,
    )  # fmt: skip
    if NEED_DX:
        _expand(
            dy_ptr, x_ptr, gate_ptr, down_ptr, weight_ptr, rstd_ptr, dx_ptr, dzg, dzd, dot_z,
            side, rows, inside, ids, low, high, 0, D, M, E, EP, BM, MP, BN, length, EVEN_N, EVEN_M,
            ROUTED, NORM, RESIDUAL, PRECISION, STAGES_N, WIDE_N,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def project_backward_kernel(
    dy_ptr, up_ptr, x_ptr, weight_ptr, expert_ptr, dh_ptr, side_ptr, T,
    D: tl.constexpr, M: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr,
    BR: tl.constexpr, BK: tl.constexpr, length, EVEN_D: tl.constexpr,
    EVEN_M: tl.constexpr,
    ROUTED: tl.constexpr, SHARED_UP: tl.constexpr, SIDE: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, WIDE_STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, rank blocks, splits of d): fp32 partial dh ``[splits, T, M]`` and sides."""
    rows, inside = tile_rows(T, BM)
    ids, low, high = route(expert_ptr, rows, inside, E, ROUTED)
    split = tl.program_id(2)
    ranks = tl.program_id(1) * BR + tl.arange(0, BR)
    dh, side = _project(
        dy_ptr, up_ptr, x_ptr, weight_ptr, rows, ranks, ids, low, high, split * length,
        D, M, E, EP, BM, BR, BK, length, EVEN_D, EVEN_M, ROUTED, SHARED_UP, SIDE, PRECISION,
        STAGES, WIDE_STAGES,
    )  # fmt: skip
    row_of_split = split.to(tl.int64) * T + rows
    store_tile(dh_ptr, dh, row_of_split, ranks, M, inside, M, not EVEN_M)
    if SIDE:
        tl.store(side_ptr + row_of_split, side, mask=inside)


@triton.jit(do_not_specialize=["T"])
def expand_backward_kernel(
    dy_ptr, x_ptr, gate_ptr, down_ptr, expert_ptr, weight_ptr, part_ptr, side_ptr, zg_ptr, zd_ptr,
    rstd_ptr, dx_ptr, dzg_ptr, dzd_ptr, h_ptr, T, scale,
    D: tl.constexpr, M: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr,
    MP: tl.constexpr, BN: tl.constexpr, length, SPLITS: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_M: tl.constexpr, ROUTED: tl.constexpr, SHARED_UP: tl.constexpr, NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    NEED_DX: tl.constexpr, SAVE_DZ: tl.constexpr, SAVE_H: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, WIDE_STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, column groups of length). Sums partials in ascending order."""
    rows, inside = tile_rows(T, BM)
    ids, low, high = route(expert_ptr, rows, inside, E, ROUTED)
    ranks = tl.arange(0, MP)
    dh = tl.zeros((BM, MP), tl.float32)
    side = tl.zeros((BM,), tl.float32)
    for s in tl.static_range(SPLITS):
        of_split = rows + tl.cast(T, tl.int64) * s
        dh += load_tile(part_ptr, of_split, ranks, M, inside, ranks < M, False, not EVEN_M)
        if RESIDUAL == "norm" and NEED_DX:
            side += tl.load(side_ptr + of_split)
    keep = inside & (ids * 0 + tl.program_id(1) == 0)
    dzg, dzd, dot_z = _activate(
        dh, zg_ptr, zd_ptr, rstd_ptr, dzg_ptr, dzd_ptr, h_ptr, rows, ranks, keep, ids, scale,
        M, E, EP, BM, MP, EVEN_M, ROUTED, SHARED_UP, NORM, SAVE_DZ, SAVE_H,
    )  # fmt: skip
    if NEED_DX:
        _expand(
            dy_ptr, x_ptr, gate_ptr, down_ptr, weight_ptr, rstd_ptr, dx_ptr, dzg, dzd, dot_z,
            side, rows, inside, ids, low, high, tl.program_id(1) * length, D, M, E, EP, BM, MP, BN,
            length, EVEN_D, EVEN_M, ROUTED, NORM, RESIDUAL, PRECISION, STAGES, WIDE_STAGES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def activate_backward_kernel(
    part_ptr, side_ptr, expert_ptr, zg_ptr, zd_ptr, rstd_ptr, dzg_ptr, dzd_ptr, h_ptr, pull_ptr,
    T, scale,
    D: tl.constexpr, M: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, MP: tl.constexpr,
    SPLITS: tl.constexpr, EVEN_M: tl.constexpr, ROUTED: tl.constexpr, NORM: tl.constexpr,
    SIDE: tl.constexpr, SAVE_H: tl.constexpr,
):  # fmt: skip
    """Large ranks: dz * rstd, scale * h, and with NORM each row's factor of -x in dx."""
    rows, inside = tile_rows(T, BM)
    ids, _, _ = route(expert_ptr, rows, inside, E, ROUTED)
    ranks = tl.arange(0, MP)
    dh = tl.zeros((BM, MP), tl.float32)
    side = tl.zeros((BM,), tl.float32)
    for s in tl.static_range(SPLITS):
        of_split = rows + tl.cast(T, tl.int64) * s
        dh += load_tile(part_ptr, of_split, ranks, M, inside, ranks < M, False, not EVEN_M)
        if SIDE:
            side += tl.load(side_ptr + of_split)
    _, _, dot_z = _activate(
        dh, zg_ptr, zd_ptr, rstd_ptr, dzg_ptr, dzd_ptr, h_ptr, rows, ranks, inside, ids, scale,
        M, E, 0, BM, MP, EVEN_M, ROUTED, False, NORM, True, SAVE_H,
    )  # fmt: skip
    if NORM:
        rstd = tl.load(rstd_ptr + rows)
        tl.store(pull_ptr + rows, rstd * rstd / D * (dot_z + rstd * side), mask=inside)


@triton.jit(do_not_specialize=["T"])
def columns_backward_kernel(
    dy_ptr, x_ptr, gate_ptr, down_ptr, expert_ptr, weight_ptr, dzg_ptr, dzd_ptr, rstd_ptr,
    pull_ptr, dx_ptr, T, ranks_end,
    D: tl.constexpr, M: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, EVEN_D: tl.constexpr, EVEN_M: tl.constexpr, ROUTED: tl.constexpr,
    NORM: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Large ranks: dx by tiles of rows and columns, over the rank in blocks of BK."""
    rows, inside = tile_rows(T, BM)
    ids, low, high = route(expert_ptr, rows, inside, E, ROUTED)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    if low == high:
        first = tl.maximum(low, 0) * M
        for k in tl.range(0, ranks_end, BK, num_stages=STAGES):
            acc = _rank_block(
                gate_ptr, down_ptr, dzg_ptr, dzd_ptr, acc, rows, inside, k, first, cols,
                D, M, BK, EVEN_D, EVEN_M, False, PRECISION,
            )  # fmt: skip
    else:
        for e in range(E):
            if (e >= low) & (e <= high):
                for k in tl.range(0, ranks_end, BK, num_stages=STAGES):
                    acc = _rank_block(
                        gate_ptr, down_ptr, dzg_ptr, dzd_ptr, acc, rows, ids == e, k, e * M, cols,
                        D, M, BK, EVEN_D, EVEN_M, True, PRECISION,
                    )  # fmt: skip
    rstd = tl.zeros((BM,), tl.float32) + 1.0
    pull = tl.zeros((BM,), tl.float32)
    gain = rstd  # dz holds rstd already
    if NORM:
        rstd = tl.load(rstd_ptr + rows)
        pull = tl.load(pull_ptr + rows)
    _write(
        dy_ptr, x_ptr, weight_ptr, dx_ptr, acc, gain, rstd, pull, rows, inside, ids, cols,
        D, EVEN_D, ROUTED, NORM, RESIDUAL,
    )  # fmt: skip


@triton.jit
def _rank_block(
    gate_ptr, down_ptr, dzg_ptr, dzd_ptr, acc, rows, counted, k, first, cols,
    D: tl.constexpr, M: tl.constexpr, BK: tl.constexpr, EVEN_D: tl.constexpr,
    EVEN_M: tl.constexpr, SOME: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + dz_gate gate + dz_down down over ranks k..k+BK; with SOME for counted rows only."""
    ranks = k + tl.arange(0, BK)
    ok = ranks < M
    dzg = load_tile(dzg_ptr, rows, ranks, M, counted, ok, SOME, not EVEN_M)
    dzd = load_tile(dzd_ptr, rows, ranks, M, counted, ok, SOME, not EVEN_M)
    wg = load_tile(gate_ptr, first + ranks, cols, D, ok, cols < D, not EVEN_M, not EVEN_D)
    wd = load_tile(down_ptr, first + ranks, cols, D, ok, cols < D, not EVEN_M, not EVEN_D)
    acc = dot(dzg, wg.to(dzg.dtype), acc, PRECISION)
    return dot(dzd, wd.to(dzg.dtype), acc, PRECISION)


def launch_backward(
    dy: Tensor,
    x: Tensor,
    gate: Tensor,
    down: Tensor,
    up: Tensor,
    expert: Tensor | None,
    norm_weight: Tensor | None,
    saved: tuple[Tensor, Tensor, Tensor],
    residual: str,
    scale: float,
    dx: Tensor,
    dz: Tensor,
    h: Tensor,
    config: Mapping[str, int],
    precision: str,
) -> None:
    """Fill dx ``[T, d]``, dz ``[2, T, m]`` (of gate and of down, times rstd) and h ``[T, m]``;
    with experts side by side (`padded_experts`) ``E m`` wide.

    What has size 0 is not computed. `saved`: zg, zd, rstd. `gate` and `down` hold the
    norm's weight.
    """
    zg, zd, rstd = saved
    (tokens, dim), (experts, rank) = x.shape, gate.shape[:2]
    padded = padded_rank(rank)
    needs_dx = dx.numel() > 0
    common = {
        "D": dim,
        "M": rank,
        "E": experts,
        "EP": padded_experts(experts, rank),
        "BM": config["BM"],
        "EVEN_M": padded == rank,
        "ROUTED": expert is not None,
        "PRECISION": precision,
        "num_warps": config["warps"],
        "enable_fp_fusion": True,
    }
    ending = {
        "MP": padded,
        "SHARED_UP": up.shape[0] == 1,
        "NORM": norm_weight is not None,
        "RESIDUAL": residual,
        "NEED_DX": needs_dx,
        "SAVE_DZ": dz.numel() > 0,
        "SAVE_H": h.numel() > 0,
    }
    tiled = not config["fused"] and config.get("tiled") and not padded_experts(experts, rank)
    if tiled and dz.numel() == 0:  # there they are what dx is computed from
        dz = x.new_empty(2, tokens, rank)
    dzg, dzd = dz if dz.numel() else (dz, dz)
    row_tiles = triton.cdiv(tokens, config["BM"])
    bk, bn = min(config["BK"], block(dim)), min(config["BN"], block(dim))
    shared = up.shape[0] == 1
    wide = padded * padded_experts(experts, rank)
    per_k, per_n = bk * x.element_size(), bn * x.element_size()
    with_side = residual == "norm" and needs_dx
    read_k = config["BM"] * (3 if with_side else 1)
    read_n = config["BM"] * ((residual != "none") + (norm_weight is not None))
    stages_k = stages_within(config["stages_k"], (read_k + padded) * per_k)
    stages_n = stages_within(config["stages_n"], (read_n + 2 * padded) * per_n)
    for_wide = 160 if wide <= 64 else 112  # picking and placing experts needs the rest
    wide_k = stages_within(config["stages_k"], (read_k + wide) * per_k, for_wide)
    wide_n = stages_within(config["stages_n"], (read_n + 2 * wide) * per_n, for_wide)
    if config["fused"]:
        fused_backward_kernel[(row_tiles,)](
            dy, x, gate, down, up, expert, norm_weight, zg, zd, rstd, dx, dzg, dzd, h, tokens,
            scale, BK=bk, BN=bn, EVEN_K=dim % bk == 0, EVEN_N=dim % bn == 0, length=dim,
            STAGES_K=stages_k, STAGES_N=stages_n,
            WIDE_K=wide_k, WIDE_N=wide_n, **ending, **common,
        )  # fmt: skip
        return
    splits = config["splits"]
    part = x.new_empty(splits, tokens, rank, dtype=torch.float32)
    side = x.new_empty(splits if with_side else 0, tokens, dtype=torch.float32)
    length = triton.cdiv(triton.cdiv(dim, splits), bk) * bk
    block_rank = min(config["BR"], padded)
    side_by_side = common["EP"] if block_rank == padded else 0
    project_backward_kernel[(row_tiles, padded // block_rank, splits)](
        dy, up, x, norm_weight, expert, part, side, tokens, BR=block_rank, BK=bk, length=length,
        EVEN_D=length * splits == dim, SHARED_UP=shared, SIDE=with_side,
        STAGES=stages_k, WIDE_STAGES=wide_k, **{**common, "EP": side_by_side},
    )  # fmt: skip
    if tiled:
        pull = x.new_empty(tokens if norm_weight is not None else 0, dtype=torch.float32)
        rows = max(16, 8192 // padded)
        activate_backward_kernel[(triton.cdiv(tokens, rows),)](
            part, side, expert, zg, zd, rstd, dzg, dzd, h, pull, tokens, scale,
            D=dim, M=rank, E=experts, BM=rows, MP=padded, SPLITS=splits, EVEN_M=padded == rank,
            ROUTED=expert is not None, NORM=norm_weight is not None, SIDE=with_side,
            SAVE_H=h.numel() > 0, num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
        if needs_dx:
            bk = min(64, padded)
            columns_backward_kernel[(triton.cdiv(tokens, 128), triton.cdiv(dim, bn))](
                dy, x, gate, down, expert, norm_weight, dzg, dzd, rstd, pull, dx, tokens, rank,
                BN=bn, BK=bk, EVEN_D=dim % bn == 0, NORM=norm_weight is not None,
                RESIDUAL=residual, STAGES=config["stages_n"],
                D=dim, M=rank, E=experts, BM=128, EVEN_M=rank % bk == 0, ROUTED=expert is not None,
                PRECISION=precision, num_warps=config["warps"], enable_fp_fusion=True,
            )  # fmt: skip
        return
    length = triton.cdiv(triton.cdiv(dim, config["groups"]), bn) * bn
    groups = triton.cdiv(dim, length) if needs_dx else 1
    expand_backward_kernel[(row_tiles, groups)](
        dy, x, gate, down, expert, norm_weight, part, side, zg, zd, rstd, dx, dzg, dzd, h, tokens,
        scale, BN=bn, length=length, SPLITS=splits, EVEN_D=length * groups == dim,
        STAGES=stages_n, WIDE_STAGES=wide_n, **ending, **common,
    )  # fmt: skip
