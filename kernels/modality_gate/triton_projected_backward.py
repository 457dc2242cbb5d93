"""The projected value gate, backward: from dlogits to the states and the projection.

    dhidden[t] = dlogits[t] weight         where mask[t], else 0      [T, D]
    dweight    = sum over masked t of dlogits[t]^T hidden[t]          [H, D]

One pass: a program owns BD columns and a run of tiles of tokens. A tile without masked tokens costs
its zeros in dhidden. dweight goes to one fp32 partial per run, added in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmadapt.kernels.common.device import on_device
from mmadapt.kernels.common.triton_dot import dot
from mmadapt.kernels.modality_gate.triton_backward import value_backward
from mmadapt.kernels.modality_gate.triton_tiles import (
    load_heads,
    options,
    ordered_sum,
    token_tile,
)


@triton.jit
def _dhidden(
    dlogits_ptr, weight_ptr, rows, masked, columns, D: tl.constexpr, H: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((BT, BD), tl.float32)
    for first in range(0, H, BH):
        heads = first + tl.arange(0, BH)
        d = load_heads(dlogits_ptr, rows, heads, masked, H, H % BH == 0).to(DTYPE)
        at = weight_ptr + heads[:, None] * D + columns[None, :]
        if H % BH == 0 and D % BD == 0:
            w = tl.load(at)
        else:
            w = tl.load(at, mask=(heads < H)[:, None] & (columns < D)[None, :], other=0.0)
        total = dot(d, w.to(DTYPE), total, PRECISION)
    # Not 0 * weight: an infinite weight must not reach an unmasked row.
    return tl.where(masked[:, None], total, 0.0)


@triton.jit(do_not_specialize=["T"])
def projection_kernel(
    dlogits_ptr, hidden_ptr, weight_ptr, mask_ptr, dhidden_ptr, part_ptr, busy_ptr, T,
    D: tl.constexpr, H: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr,
    TILES: tl.constexpr, NEED_HIDDEN: tl.constexpr, NEED_WEIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: column tiles x runs of TILES token tiles x blocks of BH heads.

    A block of heads has its own part of dweight; the first one also writes dhidden.
    """
    DTYPE: tl.constexpr = hidden_ptr.dtype.element_ty
    columns = tl.program_id(0) * BD + tl.arange(0, BD)
    run = tl.program_id(1)
    block = tl.program_id(2)
    heads = block * BH + tl.arange(0, BH)
    dweight = tl.zeros((BH, BD), tl.float32)
    total = 0
    for i in range(TILES):
        rows, inside, masked, count = token_tile(mask_ptr, run * TILES + i, T, BT)
        total += count
        at = rows[:, None] * D + columns[None, :]
        keep = masked[:, None]
        write = inside[:, None]
        if D % BD != 0:
            keep = keep & (columns < D)[None, :]
            write = write & (columns < D)[None, :]
        if count > 0:
            if NEED_WEIGHT:
                d = load_heads(dlogits_ptr, rows, heads, masked, H, H % BH == 0).to(DTYPE)
                x = tl.load(hidden_ptr + at, mask=keep, other=0.0)
                dweight = dot(tl.trans(d), x, dweight, PRECISION)
            if NEED_HIDDEN and block == 0:
                dx = _dhidden(
                    dlogits_ptr, weight_ptr, rows, masked, columns, D, H, BT, BD, BH, DTYPE,
                    PRECISION,
                )  # fmt: skip
                tl.store(dhidden_ptr + at, dx.to(DTYPE), mask=write)
        elif NEED_HIDDEN and block == 0:
            tl.store(dhidden_ptr + at, tl.zeros((BT, BD), DTYPE), mask=write)
    if NEED_WEIGHT:
        tl.store(busy_ptr + run, (total > 0).to(tl.int8))
        if total > 0:
            at = (run.to(tl.int64) * H + heads)[:, None] * D + columns[None, :]
            inside_weight = (heads < H)[:, None] & (columns < D)[None, :]
            tl.store(part_ptr + at, dweight, mask=inside_weight)


def projected_backward(
    dy: Tensor,
    value: Tensor,
    hidden: Tensor,
    weight: Tensor,
    mask: Tensor,
    gate: Tensor,
    dvalue: Tensor,
    dhidden: Tensor,
    dweight: Tensor,
    config: dict[str, int],
    projection: dict[str, int],
    precision: str,
) -> None:
    """Fill `dvalue`, `dhidden` ``[T, D]`` and `dweight` ``[H, D]``, unless of size 0.

    `config`: of `value_backward`. `projection`: BT, BD, BH, RUNS (how many runs of tokens at most;
    a power of two) and num_warps.
    """
    tokens, width = hidden.shape
    heads = weight.shape[0]
    if tokens == 0:
        dweight.zero_()
        return
    need_hidden, need_weight = dhidden.numel() > 0, dweight.numel() > 0
    through = need_hidden or need_weight
    dlogits = torch.empty((tokens, heads) if through else 0, dtype=torch.float32, device=dy.device)
    value_backward(dy, value, gate, mask, dvalue, dlogits, mask, "projected", config)
    if not through:
        return
    tiles = triton.cdiv(tokens, projection["BT"])
    # A power of two, so that a new number of tokens rarely means a new kernel.
    per_run = triton.next_power_of_2(triton.cdiv(tiles, projection["RUNS"]))
    runs = triton.cdiv(tiles, per_run)
    part = torch.empty((runs, heads, width) if need_weight else 0, dtype=torch.float32,
                       device=dy.device)  # fmt: skip
    busy = torch.empty(runs, dtype=torch.int8, device=dy.device)
    # Without dweight one block of heads does it all.
    blocks = triton.cdiv(heads, projection["BH"]) if need_weight else 1
    with on_device(dy):
        projection_kernel[(triton.cdiv(width, projection["BD"]), runs, blocks)](
            dlogits, hidden, weight, mask, dhidden, part, busy, tokens, width, heads,
            projection["BT"], projection["BD"], projection["BH"], per_run, need_hidden,
            need_weight, precision, **options(projection["num_warps"]),
        )  # fmt: skip
        if need_weight:
            ordered_sum(part, busy, dweight)
