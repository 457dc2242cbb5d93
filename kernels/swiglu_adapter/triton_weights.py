"""Weight gradients of the SwiGLU adapter: sums over tokens of outer products, in a fixed order.

    G = x^T (dz rstd)      dgate, ddown = (g G)^T, g the norm's weight      dup = dy^T (scale h)
    dg = sum over ranks and experts of W * G  (+ sum_t dy x rstd where the base is normalised)

The second factor is narrow, so each program owns a block of columns of x (or dy) for all experts at
once: entries of other experts are masked out of the narrow factor, and x is read once whatever the
routing. Tokens are split over programs into fp32 partial sums, which a second kernel adds in
ascending order: reruns are bit-equal, and the number of splits depends on the shapes alone.
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmadapt.kernels.common.triton_dot import dot
from mmadapt.kernels.swiglu_adapter.triton_tiles import block, load_tile, padded_rank

ALL, MATCHING, ANY = 0, 1, 2
"""Which tokens count: every one; those of the column's expert; those with any expert.

MATCHING masks the narrow factor as it is loaded, which costs its asynchronous loads. Where all
experts fit side by side the backward kernel has spread it over them (`spread`), zeros included.
"""


@triton.jit(do_not_specialize=["T", "length"])
def outer_kernel(
    a_ptr, b0_ptr, b1_ptr, expert_ptr, part_ptr, T, length,
    D: tl.constexpr, M: tl.constexpr, E: tl.constexpr, MP: tl.constexpr, BD: tl.constexpr,
    BC: tl.constexpr, BT: tl.constexpr, PAIR: tl.constexpr, WHO: tl.constexpr,
    SPREAD: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """part[split, pair, e, d, j] = sum over the split's tokens of a[t, d] b_pair[t, j].

    Grid (column blocks of a, blocks of (expert, rank), splits of `length` tokens).
    """
    cols = tl.program_id(0) * BD + tl.arange(0, BD)
    flat = tl.program_id(1) * BC + tl.arange(0, BC)
    experts, ranks = flat // MP, flat % MP
    wanted = (experts < E) & (ranks < M)
    split = tl.program_id(2)
    start = split.to(tl.int64) * length
    end = tl.minimum(start + length, T)
    acc0 = tl.zeros((BD, BC), tl.float32)
    acc1 = tl.zeros((BD, BC), tl.float32)
    for t in tl.range(0, length, BT, num_stages=STAGES):
        rows = start + t + tl.arange(0, BT)
        counted = rows < end
        narrow = wanted[None, :]
        if WHO != 0:
            ids = tl.load(expert_ptr + rows, mask=counted, other=-1)
            counted = ids >= 0
            if WHO == 1:
                narrow = narrow & (ids[:, None] == experts[None, :])
        at = rows[:, None] * D + cols[None, :]
        if EVEN_D:
            a = tl.load(a_ptr + at, mask=counted[:, None], other=0.0)
        else:
            a = tl.load(a_ptr + at, mask=counted[:, None] & (cols < D)[None, :], other=0.0)
        narrow = narrow & counted[:, None]
        if SPREAD:
            at = rows[:, None] * (E * M) + (experts * M + ranks)[None, :]
        else:
            at = rows[:, None] * M + ranks[None, :]
        b0 = tl.load(b0_ptr + at, mask=narrow, other=0.0)
        acc0 = dot(tl.trans(a), b0, acc0, PRECISION)
        if PAIR:
            b1 = tl.load(b1_ptr + at, mask=narrow, other=0.0)
            acc1 = dot(tl.trans(a), b1, acc1, PRECISION)
    pairs: tl.constexpr = 2 if PAIR else 1
    at = (experts[None, :] * D + cols[:, None]) * M + ranks[None, :]
    inside = wanted[None, :] & (cols < D)[:, None]
    first = part_ptr + split.to(tl.int64) * (pairs * E * D * M)
    tl.store(first + at, acc0, mask=inside)
    if PAIR:
        tl.store(first + E * D * M + at, acc1, mask=inside)


@triton.jit
def reduce_transposed_kernel(
    part_ptr, weight_ptr, dgate_ptr, ddown_ptr, splits,
    D: tl.constexpr, M: tl.constexpr, E: tl.constexpr, MP: tl.constexpr, BD: tl.constexpr,
    NORM: tl.constexpr, NEED_GATE: tl.constexpr, NEED_DOWN: tl.constexpr,
):  # fmt: skip
    """dgate, ddown ``[E, M, D]`` from part ``[splits, 2, E, D, M]``. Grid (column blocks, E, 2)."""
    cols = tl.program_id(0) * BD + tl.arange(0, BD)
    e, pair = tl.program_id(1), tl.program_id(2)
    ranks = tl.arange(0, MP)
    if (pair == 0 and NEED_GATE) or (pair == 1 and NEED_DOWN):
        total = _sum_splits(part_ptr + (pair * E + e) * D * M, cols, ranks, splits, D, M, E, BD, MP)
        if NORM:
            weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
            total = total * weight[:, None]
        at = (e * M + ranks[:, None]) * D + cols[None, :]
        inside = (ranks < M)[:, None] & (cols < D)[None, :]
        if pair == 0:
            tl.store(dgate_ptr + at, tl.trans(total).to(dgate_ptr.dtype.element_ty), mask=inside)
        else:
            tl.store(ddown_ptr + at, tl.trans(total).to(ddown_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _sum_splits(
    part_ptr, cols, ranks, splits, D: tl.constexpr, M: tl.constexpr, E: tl.constexpr,
    BD: tl.constexpr, MP: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((BD, MP), tl.float32)
    for s in range(splits):
        part = part_ptr + tl.cast(s, tl.int64) * (2 * E * D * M)
        total += load_tile(part, cols, ranks, M, cols < D, ranks < M, True, True)
    return total


@triton.jit
def reduce_kernel(part_ptr, out_ptr, count, splits, BLOCK: tl.constexpr):
    """out ``[count]`` from part ``[splits, count]``."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for s in range(splits):
        total += tl.load(part_ptr + tl.cast(s, tl.int64) * count + at, mask=at < count, other=0.0)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=at < count)


@triton.jit
def norm_weight_kernel(
    part_ptr, sums_ptr, gate_ptr, down_ptr, dnorm_ptr, splits, sum_splits,
    D: tl.constexpr, M: tl.constexpr, E: tl.constexpr, MP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dg from part ``[splits, 2, E, D, M]``, the raw weights ``[E, M, D]`` and sums
    ``[sum_splits, D]``. Grid (column blocks)."""
    cols = tl.program_id(0) * BD + tl.arange(0, BD)
    ranks = tl.arange(0, MP)
    dnorm = tl.zeros((BD,), tl.float32)
    for e in range(E):
        for pair in tl.static_range(2):
            weights = gate_ptr if pair == 0 else down_ptr
            total = _sum_splits(
                part_ptr + (pair * E + e) * D * M, cols, ranks, splits, D, M, E, BD, MP
            )
            w = load_tile(weights + e * M * D, ranks, cols, D, ranks < M, cols < D, True, True)
            dnorm += tl.sum(total * tl.trans(w.to(tl.float32)), 1)
    for s in range(sum_splits):
        dnorm += tl.load(sums_ptr + s * D + cols, mask=cols < D, other=0.0)
    tl.store(dnorm_ptr + cols, dnorm.to(dnorm_ptr.dtype.element_ty), mask=cols < D)


@triton.jit(do_not_specialize=["T", "length"])
def column_sums_kernel(
    dy_ptr, x_ptr, rstd_ptr, sums_ptr, T, length,
    D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """sums[split, d] = sum over the split's tokens of dy x rstd. Grid (column blocks, splits)."""
    cols = tl.program_id(0) * BD + tl.arange(0, BD)
    start = tl.program_id(1).to(tl.int64) * length
    end = tl.minimum(start + length, T)
    total = tl.zeros((BD,), tl.float32)
    for t in tl.range(0, length, BT, num_stages=4):
        rows = start + t + tl.arange(0, BT)
        inside = (rows < end)[:, None] & (cols < D)[None, :]
        at = rows[:, None] * D + cols[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=rows < end, other=0.0)
        total += tl.sum(x * dy * rstd[:, None], 0)
    tl.store(sums_ptr + tl.program_id(1) * D + cols, total, mask=cols < D)


def _splits(tokens: int, programs: int, config: Mapping[str, int]) -> tuple[int, int]:
    """Number of token splits and their length: about ``config["programs"]`` programs in all."""
    wanted = max(1, config["programs"] // programs)
    most = max(1, tokens // (4 * config["BT"]))
    length = triton.cdiv(triton.cdiv(tokens, min(wanted, most)), config["BT"]) * config["BT"]
    return triton.cdiv(tokens, length), length


def _outer(
    a: Tensor,
    narrow: list[Tensor],
    expert: Tensor | None,
    experts: int,
    rank: int,
    who: int,
    config: Mapping[str, int],
    precision: str,
) -> Tensor:
    (tokens, dim), width = a.shape, narrow[0].shape[1]
    spread = width != rank
    if spread:
        who = ANY
    padded = padded_rank(rank)
    bd = min(config["BD"], block(dim))
    bc = min(config["BC"], triton.next_power_of_2(experts * padded))
    grid = triton.cdiv(dim, bd), triton.cdiv(experts * padded, bc)
    splits, length = _splits(tokens, grid[0] * grid[1], config)
    part = a.new_empty(splits, len(narrow), experts, dim, rank, dtype=torch.float32)
    outer_kernel[(*grid, splits)](
        a, narrow[0], narrow[-1], expert, part, tokens, length,
        D=dim, M=rank, E=experts, MP=padded, BD=bd, BC=bc, BT=config["BT"],
        PAIR=len(narrow) == 2, WHO=who, SPREAD=spread, EVEN_D=dim % bd == 0, PRECISION=precision,
        STAGES=config["stages"], num_warps=config["warps"], enable_fp_fusion=True,
    )  # fmt: skip
    return part


def launch_gate_down(
    x: Tensor,
    dz: Tensor,
    gate: Tensor,
    down: Tensor,
    expert: Tensor | None,
    norm: tuple[Tensor, Tensor, Tensor] | None,
    dgate: Tensor,
    ddown: Tensor,
    dnorm: Tensor,
    config: Mapping[str, int],
    precision: str,
    base_is_norm: bool,
) -> None:
    """Fill dgate, ddown ``[E, m, d]`` and dnorm ``[d]``; what has size 0 is not computed.

    `dz`: ``[2, T, m]`` or ``[2, T, E m]``, times rstd; `gate`,
    `down`: as the user holds them; `norm`: its weight,
    rstd ``[T]`` and dy ``[T, d]``.
    """
    experts, rank, dim = gate.shape
    who = ALL if expert is None else MATCHING
    part = _outer(x, list(dz), expert, experts, rank, who, config, precision)
    splits = part.shape[0]
    shape = {"D": dim, "M": rank, "E": experts, "MP": padded_rank(rank)}
    bd = min(32, block(dim))
    if dgate.numel() or ddown.numel():
        weight = None if norm is None else norm[0]
        reduce_transposed_kernel[(triton.cdiv(dim, bd), experts, 2)](
            part, weight, dgate, ddown, splits, **shape, BD=bd, NORM=norm is not None,
            NEED_GATE=dgate.numel() > 0, NEED_DOWN=ddown.numel() > 0,
        )  # fmt: skip
    if norm is not None and dnorm.numel():
        sums = column_sums(norm[2], x, norm[1]) if base_is_norm else part
        norm_weight_kernel[(triton.cdiv(dim, bd),)](
            part, sums, gate, down, dnorm, splits, sums.shape[0] if base_is_norm else 0,
            **shape, BD=bd,
        )  # fmt: skip


def column_sums(dy: Tensor, x: Tensor, rstd: Tensor) -> Tensor:
    """Sums over tokens of dy x rstd ``[splits, d]``, still to be added over the splits."""
    tokens, dim = x.shape
    splits, length = _splits(tokens, triton.cdiv(dim, 128), {"programs": 1024, "BT": 32})
    sums = x.new_empty(splits, dim, dtype=torch.float32)
    column_sums_kernel[(triton.cdiv(dim, 128), splits)](
        dy, x, rstd, sums, tokens, length, D=dim, BD=128, BT=32
    )
    return sums


def launch_up(
    dy: Tensor,
    h: Tensor,
    expert: Tensor | None,
    dup: Tensor,
    config: Mapping[str, int],
    precision: str,
) -> None:
    """Fill dup ``[E or 1, d, m]`` from dy ``[T, d]`` and scale * h, ``[T, m]`` or
    ``[T, E m]``."""
    ups = dup.shape[0]
    who = ALL if expert is None else ANY if ups == 1 else MATCHING
    part = _outer(dy, [h], expert, ups, dup.shape[2], who, config, precision)
    reduce_kernel[(triton.cdiv(dup.numel(), 512),)](
        part, dup, dup.numel(), part.shape[0], BLOCK=512, num_warps=4
    )
