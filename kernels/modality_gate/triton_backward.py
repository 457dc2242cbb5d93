"""The value gate, backward, from dy and value (or the masked rows that were saved).

    dvalue[t, h, :] = dy[t, h, :] * g[t, h]              where mask[t], else dy[t, h, :]
    dlogits[t, h]   = (1 - g^2) sum_c dy[t, h, c] value[t, h, c]    where mask[t], else 0

with g = tanh(logits). Logits ``[H]`` sum over tokens: one fp32 partial per tile, added in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmadapt.kernels.common.device import on_device
from mmadapt.kernels.modality_gate.triton_tiles import (
    copy_group,
    gate_tile,
    load_heads,
    options,
    ordered_sum,
    store_heads,
    token_tile,
    value_index,
)


@triton.jit
def _through(
    dy_ptr, value_ptr, dvalue_ptr, rows, inside, masked, heads, gate,
    H: tl.constexpr, SIZE: tl.constexpr, BT: tl.constexpr, HB: tl.constexpr, BC: tl.constexpr,
    EVEN_H: tl.constexpr, NEED_VALUE: tl.constexpr, NEED_LOGITS: tl.constexpr,
):  # fmt: skip
    """Write dvalue of a tile with masked tokens and return sum_c dy value of those tokens."""
    total = tl.zeros((BT, HB), tl.float32)
    for c in range(0, SIZE, BC):
        at, mask = value_index(
            rows, heads, c, inside if NEED_VALUE else masked, H, SIZE, BC, EVEN_H
        )
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0)
        wide = dy.to(tl.float32)
        if NEED_VALUE:
            dx = (wide * gate[:, :, None]).to(dy.dtype)
            tl.store(dvalue_ptr + at, tl.where(masked[:, None, None], dx, dy), mask=mask)
        if NEED_LOGITS:
            keep = mask & masked[:, None, None]
            x = tl.load(value_ptr + at, mask=keep, other=0.0)
            total += tl.sum(tl.where(masked[:, None, None], wide, 0.0) * x.to(tl.float32), 2)
    return total


@triton.jit(do_not_specialize=["T"])
def backward_kernel(
    dy_ptr, value_ptr, gate_ptr, mask_ptr, dvalue_ptr, dlogits_ptr, busy_ptr, T,
    H: tl.constexpr, SIZE: tl.constexpr, BT: tl.constexpr, HB: tl.constexpr, BC: tl.constexpr,
    BW: tl.constexpr, KIND: tl.constexpr, NEED_VALUE: tl.constexpr, NEED_LOGITS: tl.constexpr,
):  # fmt: skip
    """Grid: token tiles x groups of heads, groups fastest. KIND says what `gate_ptr` and
    `dlogits_ptr` hold: "static": logits ``[H]``, partials ``[tiles, H]``; "token": both ``[T, H]``;
    "projected": g ``[T, H]``, and dlogits ``[T, H]`` written at masked tokens alone.
    """
    GROUPS: tl.constexpr = (H + HB - 1) // HB
    EVEN_H: tl.constexpr = H % HB == 0
    group = tl.program_id(0) % GROUPS
    tile = tl.program_id(0) // GROUPS
    rows, inside, masked, count = token_tile(mask_ptr, tile, T, BT)
    heads = group * HB + tl.arange(0, HB)
    if count > 0:
        if KIND == "projected":
            gate = load_heads(gate_ptr, rows, heads, masked, H, EVEN_H)
        else:
            gate = gate_tile(gate_ptr, rows, heads, masked, BT, HB, H, EVEN_H, KIND == "token")
        through = _through(
            dy_ptr, value_ptr, dvalue_ptr, rows, inside, masked, heads, gate,
            H, SIZE, BT, HB, BC, EVEN_H, NEED_VALUE, NEED_LOGITS,
        )  # fmt: skip
        if NEED_LOGITS:
            dlogits = through * (1.0 - gate * gate)
            if KIND == "static":
                at = dlogits_ptr + tile.to(tl.int64) * H + heads
                tl.store(at, tl.sum(tl.where(masked[:, None], dlogits, 0.0), 0), mask=heads < H)
            elif KIND == "token":
                dlogits = tl.where(masked[:, None], dlogits, 0.0)
                store_heads(dlogits_ptr, dlogits, rows, heads, inside, H, EVEN_H)
            else:
                store_heads(dlogits_ptr, dlogits, rows, heads, masked, H, EVEN_H)
    else:
        if NEED_VALUE:
            copy_group(dy_ptr, dvalue_ptr, rows, inside, group, H, SIZE, HB, BW, EVEN_H)
        if NEED_LOGITS and KIND == "token":
            zeros = tl.zeros((BT, HB), tl.float32)
            store_heads(dlogits_ptr, zeros, rows, heads, inside, H, EVEN_H)
    if NEED_LOGITS and KIND == "static":
        tl.store(busy_ptr + tile, (count > 0).to(tl.int8))


def value_backward(
    dy: Tensor,
    value: Tensor,
    gate: Tensor,
    mask: Tensor,
    dvalue: Tensor,
    dlogits: Tensor,
    busy: Tensor,
    kind: str,
    config: dict[str, int],
) -> None:
    """Launch `backward_kernel`; gradients of size 0 are not computed."""
    tokens, heads, size = dy.shape
    programs = triton.cdiv(tokens, config["BT"]) * triton.cdiv(heads, config["HB"])
    if tokens * heads == 0:
        return
    with on_device(dy):
        backward_kernel[(programs,)](
            dy, value, gate, mask, dvalue, dlogits, busy, tokens, heads, size,
            config["BT"], config["HB"], config["BC"], config["BW"], kind,
            dvalue.numel() > 0, dlogits.numel() > 0, **options(config["num_warps"], 128),
        )  # fmt: skip


def backward(
    dy: Tensor,
    value: Tensor,
    logits: Tensor,
    mask: Tensor,
    dvalue: Tensor,
    dlogits: Tensor,
    config: dict[str, int],
) -> None:
    """Fill `dvalue` ``[T, H, h]`` and `dlogits` (``[H]`` or ``[T, H]``), unless of size 0."""
    if logits.ndim == 2 or dlogits.numel() == 0:
        kind = "token" if logits.ndim == 2 else "static"
        value_backward(dy, value, logits, mask, dvalue, dlogits, mask, kind, config)
        return
    tiles = triton.cdiv(dy.shape[0], config["BT"])
    if tiles == 0:
        dlogits.zero_()
        return
    part = torch.empty(tiles, dy.shape[1], dtype=torch.float32, device=dy.device)
    busy = torch.empty(tiles, dtype=torch.int8, device=dy.device)
    value_backward(dy, value, logits, mask, dvalue, part, busy, "static", config)
    with on_device(dy):
        ordered_sum(part, busy, dlogits)
