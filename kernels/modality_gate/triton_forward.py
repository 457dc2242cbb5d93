"""The value gate, forward.

    y[t, h, :] = value[t, h, :] * tanh(logits[t, h])   where mask[t], else value[t, h, :]

with logits given, or projected: logits[t] = weight hidden[t], computed by the program that uses
them. Fresh output: one pass copies the tiles without masked tokens and gates the others. In place:
y is value, only masked rows are read and written, and `saved` keeps what they were, since the
gradient of the gate needs it and a gate of zero destroys it.
"""

import triton
import triton.language as tl
from torch import Tensor

from mmadapt.kernels.common.device import on_device
from mmadapt.kernels.common.triton_dot import dot
from mmadapt.kernels.modality_gate.triton_tiles import (
    copy_group,
    gate_tile,
    options,
    store_heads,
    tanh,
    token_tile,
    value_index,
)


@triton.jit
def _scale(
    value_ptr, y_ptr, saved_ptr, rows, inside, masked, heads, gate,
    H: tl.constexpr, SIZE: tl.constexpr, BC: tl.constexpr, EVEN_H: tl.constexpr,
    INPLACE: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    for c in range(0, SIZE, BC):
        at, mask = value_index(rows, heads, c, masked if INPLACE else inside, H, SIZE, BC, EVEN_H)
        x = tl.load(value_ptr + at, mask=mask)
        if SAVE:
            tl.store(saved_ptr + at, x, mask=mask)
        y = (x.to(tl.float32) * gate[:, :, None]).to(x.dtype)
        if not INPLACE:
            y = tl.where(masked[:, None, None], y, x)
        tl.store(y_ptr + at, y, mask=mask)


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    value_ptr, logits_ptr, mask_ptr, y_ptr, saved_ptr, T,
    H: tl.constexpr, SIZE: tl.constexpr, BT: tl.constexpr, HB: tl.constexpr, BC: tl.constexpr,
    BW: tl.constexpr, PER_TOKEN: tl.constexpr, INPLACE: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """Grid: token tiles x groups of heads, groups fastest."""
    GROUPS: tl.constexpr = (H + HB - 1) // HB
    EVEN_H: tl.constexpr = H % HB == 0
    group = tl.program_id(0) % GROUPS
    rows, inside, masked, count = token_tile(mask_ptr, tl.program_id(0) // GROUPS, T, BT)
    heads = group * HB + tl.arange(0, HB)
    if count > 0:
        gate = gate_tile(logits_ptr, rows, heads, masked, BT, HB, H, EVEN_H, PER_TOKEN)
        _scale(
            value_ptr, y_ptr, saved_ptr, rows, inside, masked, heads, gate,
            H, SIZE, BC, EVEN_H, INPLACE, SAVE,
        )  # fmt: skip
    elif not INPLACE:
        copy_group(value_ptr, y_ptr, rows, inside, group, H, SIZE, HB, BW, EVEN_H)


@triton.jit
def _project(
    hidden_ptr, weight_ptr, rows, masked, heads, D: tl.constexpr, H: tl.constexpr,
    BT: tl.constexpr, HB: tl.constexpr, BK: tl.constexpr, EVEN_H: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """logits ``[BT, HB]``; rows outside the mask are not read."""
    logits = tl.zeros((BT, HB), tl.float32)
    for k in tl.range(0, D, BK, num_stages=STAGES):
        columns = k + tl.arange(0, BK)
        at = rows[:, None] * D + columns[None, :]
        weight_at = heads[:, None] * D + columns[None, :]
        if D % BK == 0:
            x = tl.load(hidden_ptr + at, mask=masked[:, None], other=0.0)
        else:
            x = tl.load(hidden_ptr + at, mask=masked[:, None] & (columns < D)[None, :], other=0.0)
        if EVEN_H and D % BK == 0:
            w = tl.load(weight_ptr + weight_at)
        else:
            w = tl.load(
                weight_ptr + weight_at,
                mask=(heads < H)[:, None] & (columns < D)[None, :],
                other=0.0,
            )
        logits = dot(x, tl.trans(w.to(x.dtype)), logits, PRECISION)
    return logits


@triton.jit(do_not_specialize=["T"])
def projected_forward_kernel(
    value_ptr, hidden_ptr, weight_ptr, mask_ptr, y_ptr, gate_ptr, saved_ptr, T,
    H: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, HB: tl.constexpr,
    BC: tl.constexpr, BW: tl.constexpr, BK: tl.constexpr, INPLACE: tl.constexpr,
    SAVE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: token tiles x groups of heads, groups fastest. A group projects its own heads only."""
    GROUPS: tl.constexpr = (H + HB - 1) // HB
    EVEN_H: tl.constexpr = H % HB == 0
    group = tl.program_id(0) % GROUPS
    rows, inside, masked, count = token_tile(mask_ptr, tl.program_id(0) // GROUPS, T, BT)
    heads = group * HB + tl.arange(0, HB)
    if count > 0:
        logits = _project(
            hidden_ptr, weight_ptr, rows, masked, heads, D, H, BT, HB, BK, EVEN_H, PRECISION,
            STAGES,
        )  # fmt: skip
        gate = tl.where(masked[:, None], tanh(logits), 0.0)
        store_heads(gate_ptr, gate, rows, heads, inside, H, EVEN_H)
        _scale(
            value_ptr, y_ptr, saved_ptr, rows, inside, masked, heads, gate,
            H, SIZE, BC, EVEN_H, INPLACE, SAVE,
        )  # fmt: skip
    else:
        store_heads(gate_ptr, tl.zeros((BT, HB), tl.float32), rows, heads, inside, H, EVEN_H)
        if not INPLACE:
            copy_group(value_ptr, y_ptr, rows, inside, group, H, SIZE, HB, BW, EVEN_H)


def forward(
    value: Tensor, logits: Tensor, mask: Tensor, y: Tensor, saved: Tensor, config: dict[str, int]
) -> None:
    """Fill `y` ``[T, H, h]``, or overwrite `value` where `y` is `value`; `saved` may have size 0.

    `config`: BT, HB, BC, BW (all powers of two) and num_warps.
    """
    tokens, heads, size = value.shape
    programs = triton.cdiv(tokens, config["BT"]) * triton.cdiv(heads, config["HB"])
    if value.numel() == 0:
        return
    with on_device(value):
        forward_kernel[(programs,)](
            value, logits, mask, y, saved, tokens, heads, size,
            config["BT"], config["HB"], config["BC"], config["BW"],
            logits.ndim == 2, y is value, saved.numel() > 0, **options(config["num_warps"], 128),
        )  # fmt: skip


def projected_forward(
    value: Tensor,
    hidden: Tensor,
    weight: Tensor,
    mask: Tensor,
    y: Tensor,
    gate: Tensor,
    saved: Tensor,
    config: dict[str, int],
    precision: str,
) -> None:
    """As `forward`, and fill `gate` ``[T, H]`` fp32, zero outside the mask.

    `config`: also BK and STAGES, the tile and the pipeline over the width of `hidden`.
    """
    tokens, heads, size = value.shape
    programs = triton.cdiv(tokens, config["BT"]) * triton.cdiv(heads, config["HB"])
    if gate.numel() == 0:
        return
    with on_device(value):
        projected_forward_kernel[(programs,)](
            value, hidden, weight, mask, y, gate, saved, tokens, heads, size, hidden.shape[1],
            config["BT"], config["HB"], config["BC"], config["BW"], config["BK"],
            y is value, saved.numel() > 0, precision, config["STAGES"],
            **options(config["num_warps"], None),
        )  # fmt: skip
