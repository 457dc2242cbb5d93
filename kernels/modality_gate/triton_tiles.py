"""What the gate's kernels share: tiles of tokens, tanh, tiles of values, ordered sums.

`value [T, H, h]` is cut into tiles of BT tokens by HB heads (a *group*), one program each. A tile
whose tokens are all outside the mask takes a branch of its own, uniform over the program, that
never touches a gate: that is what makes the cost follow the number of masked tokens without a list
of them, hence without the host knowing it.
"""

import torch
import triton
import triton.language as tl


def options(warps: int, registers: int | None = 255) -> dict[str, int | bool]:
    """Launch options. Left to itself ptxas spills a few bytes to fit one more program on an SM;
    told how many registers a thread may have, it does not (but for the projected forward, where
    it is the other way round: None)."""
    settings = {"num_warps": warps, "enable_fp_fusion": True}
    return settings if torch.version.hip or not registers else settings | {"maxnreg": registers}


@triton.jit
def token_tile(mask_ptr, tile, T, BT: tl.constexpr):
    """Rows of a tile, which of them exist, which are masked, and how many are."""
    rows = tile * BT + tl.arange(0, BT)
    inside = rows < T
    masked = (tl.load(mask_ptr + rows, mask=inside, other=0) != 0) & inside
    return rows.to(tl.int64), inside, masked, tl.sum(masked.to(tl.int32), 0)


@triton.jit
def tanh(a):
    """tanh in fp32 to about 2e-7 relative, everywhere.

    Fresh gates sit at 0, where 1 - 2 / (1 + exp(2a)) and 2 sigmoid(2a) - 1 cancel (1.7e-4 relative
    at a = 1e-4). Below 0.55: a + a^3 q(a^2), with q the polynomial of least relative error of tanh
    (1.0e-9 in exact arithmetic). libdevice has a tanh, Triton's interpreter has not.
    """
    square = a * a
    q = -6.274232372e-3 * square + 2.107167356e-2
    q = q * square - 5.385230843e-2
    q = q * square + 1.333258612e-1
    q = q * square - 3.333331756e-1
    near = a + a * (square * q)
    size = tl.abs(a)
    e = tl.exp(-2.0 * size)
    far = (1.0 - e) / (1.0 + e)
    return tl.where(size < 0.55, near, tl.where(a < 0, -far, far))


@triton.jit
def load_heads(ptr, rows, heads, keep, H: tl.constexpr, EVEN_H: tl.constexpr):
    """``[BT, HB]`` of a ``[T, H]`` matrix, zeros where `keep` is false."""
    mask = keep[:, None]
    if not EVEN_H:
        mask = mask & (heads < H)[None, :]
    return tl.load(ptr + rows[:, None] * H + heads[None, :], mask=mask, other=0.0)


@triton.jit
def store_heads(ptr, tile, rows, heads, keep, H: tl.constexpr, EVEN_H: tl.constexpr):
    """Counterpart of `load_heads`."""
    mask = keep[:, None]
    if not EVEN_H:
        mask = mask & (heads < H)[None, :]
    tl.store(ptr + rows[:, None] * H + heads[None, :], tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def gate_tile(
    logits_ptr, rows, heads, masked, BT: tl.constexpr, HB: tl.constexpr, H: tl.constexpr,
    EVEN_H: tl.constexpr, PER_TOKEN: tl.constexpr,
):  # fmt: skip
    """tanh(logits) ``[BT, HB]`` of masked tokens, from logits ``[T, H]`` or ``[H]``."""
    if PER_TOKEN:
        return tanh(load_heads(logits_ptr, rows, heads, masked, H, EVEN_H).to(tl.float32))
    logits = tl.load(logits_ptr + heads, mask=heads < H, other=0.0).to(tl.float32)
    return tl.broadcast_to(tanh(logits)[None, :], (BT, HB))


@triton.jit
def value_index(
    rows, heads, first, keep, H: tl.constexpr, SIZE: tl.constexpr, BC: tl.constexpr,
    EVEN_H: tl.constexpr,
):  # fmt: skip
    """Offsets ``[BT, HB, BC]`` into ``[T, H, SIZE]`` from channel `first` on, and their mask."""
    channels = first + tl.arange(0, BC)
    at = rows[:, None, None] * (H * SIZE) + (heads * SIZE)[None, :, None] + channels[None, None, :]
    mask = keep[:, None, None]
    if not EVEN_H:
        mask = mask & (heads < H)[None, :, None]
    if SIZE % BC != 0:
        mask = mask & (channels < SIZE)[None, None, :]
    return at, mask


@triton.jit
def copy_group(
    source_ptr, target_ptr, rows, inside, group, H: tl.constexpr, SIZE: tl.constexpr,
    HB: tl.constexpr, BW: tl.constexpr, EVEN_H: tl.constexpr,
):  # fmt: skip
    """The tile of one group, copied as plain columns."""
    WIDTH: tl.constexpr = HB * SIZE
    for c in range(0, WIDTH, BW):
        within = c + tl.arange(0, BW)
        at = rows[:, None] * (H * SIZE) + (group * WIDTH + within)[None, :]
        mask = inside[:, None]
        if WIDTH % BW != 0:
            mask = mask & (within < WIDTH)[None, :]
        if not EVEN_H:
            mask = mask & (group * WIDTH + within < H * SIZE)[None, :]
        tl.store(target_ptr + at, tl.load(source_ptr + at, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["P"])
def sum_kernel(
    part_ptr, busy_ptr, out_ptr, P,
    N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """out[n] = sum over p of part[p, n], always in the same order; p with busy[p] = 0 are zero
    and their part was never written."""
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    total = tl.zeros((BN,), tl.float32)
    for i in range(CHUNKS):
        p = i * BP + tl.arange(0, BP)
        live = tl.load(busy_ptr + p, mask=p < P, other=0) != 0
        mask = live[:, None] & (columns < N)[None, :]
        at = part_ptr + p.to(tl.int64)[:, None] * N + columns[None, :]
        total += tl.sum(tl.load(at, mask=mask, other=0.0), 0)
    tl.store(out_ptr + columns, total.to(out_ptr.dtype.element_ty), mask=columns < N)


def ordered_sum(part: torch.Tensor, busy: torch.Tensor, out: torch.Tensor) -> None:
    """``out[...] = sum(part[p, ...] for p where busy[p])``; part fp32 ``[P, *out.shape]``."""
    count, width = part.shape[0], out.numel()
    block = min(triton.next_power_of_2(count), 128)
    columns = min(triton.next_power_of_2(width), 4096 // block)
    # A power of two, so that a new number of tokens rarely means a new kernel.
    chunks = triton.next_power_of_2(triton.cdiv(count, block))
    sum_kernel[(triton.cdiv(width, columns),)](
        part, busy, out, count, width, block, columns, chunks, **options(4)
    )
