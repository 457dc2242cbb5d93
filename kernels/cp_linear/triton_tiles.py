"""What the kernels of the factored linear layer share: products, the mode, dropout."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def cast(tile, dtype: tl.constexpr):
    """To nearest even also in the interpreter, which truncates fp32 to bf16."""
    if INTERPRETED and tile.dtype == tl.float32 and dtype == tl.bfloat16:
        bits = tile.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        tile = bits.to(tl.uint32).to(tl.float32, bitcast=True)
    return tile.to(dtype)


@triton.jit
def load_tile(ptr, rows, cols, row_stride, end, CHECK_ROWS: tl.constexpr, CHECK_COLS: tl.constexpr):
    """``[len(rows), len(cols)]`` of a row-major matrix, zeros where the checked index >= `end`."""
    at = ptr + rows[:, None] * row_stride + cols[None, :]
    if CHECK_ROWS:
        tile = tl.load(at, mask=(rows < end)[:, None], other=0.0)
    elif CHECK_COLS:
        tile = tl.load(at, mask=(cols < end)[None, :], other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def load_factor(
    ptr, outer, ranks, D: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    RANK_FIRST: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """``[len(outer), RP]`` of a factor stored ``[R, D]`` (RANK_FIRST) or ``[D, R]``.

    Ranks beyond R are zeros, and with CHECK the outer indices beyond D.
    """
    if RANK_FIRST:
        at = ptr + outer[:, None] + ranks[None, :] * D
    else:
        at = ptr + outer[:, None] * R + ranks[None, :]
    if CHECK:
        tile = tl.load(at, mask=(outer < D)[:, None] & (ranks < R)[None, :], other=0.0)
    elif R != RP:
        tile = tl.load(at, mask=(ranks < R)[None, :], other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def apply_mode(
    z, mode_ptr, R: tl.constexpr, RP: tl.constexpr, DENSE: tl.constexpr, TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``z M`` or ``z M^T`` in fp32; zero in the padded ranks."""
    ranks = tl.arange(0, RP)
    if DENSE:
        other = tl.arange(0, RP)
        at = mode_ptr + ranks[:, None] * R + other[None, :]
        if TRANSPOSED:
            at = mode_ptr + other[None, :] * R + ranks[:, None]
        mode = tl.load(at, mask=(ranks < R)[:, None] & (other < R)[None, :], other=0.0)
        zeros = tl.zeros(z.shape, tl.float32)
        out = tl.dot(z, mode.to(tl.float32), zeros, input_precision=PRECISION)
    else:
        mode = tl.load(mode_ptr + ranks, mask=ranks < R, other=0.0)
        out = z * mode.to(tl.float32)[None, :]
    return out


@triton.jit
def keep_factor(seed_ptr, rows, ranks, threshold, kept, R: tl.constexpr):
    """`kept` or 0 at (row, rank): the mask of `reference.keep_mask`, bit for bit."""
    seed = tl.load(seed_ptr).to(tl.uint64)
    index = (rows.to(tl.int64)[:, None] * R + ranks[None, :]).to(tl.uint64)
    bits = index * 0x9E3779B97F4A7C15 + seed
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
    return tl.where((bits >> 40).to(tl.int32) >= threshold, kept, 0.0)
