"""What the SwiGLU adapter's kernels share: tiles, routing of rows, the activation.

Two rules of these kernels come from wrong results on Hopper with Triton 3.6 (bench/NOTES.md): what
a pipelined product reads from shared memory is not used in registers in the same loop; and bounds
of loops with products are run-time values, so that LLVM does not unroll them completely.
"""

import triton
import triton.language as tl


@triton.jit
def load_tile(
    ptr, outer, inner, stride, outer_ok, inner_ok,
    CHECK_OUTER: tl.constexpr, CHECK_INNER: tl.constexpr,
):  # fmt: skip
    """``[len(outer), len(inner)]`` at ``outer * stride + inner``; zeros where checks fail."""
    at = ptr + outer[:, None] * stride + inner[None, :]
    if CHECK_OUTER and CHECK_INNER:
        return tl.load(at, mask=outer_ok[:, None] & inner_ok[None, :], other=0.0)
    if CHECK_OUTER:
        return tl.load(at, mask=outer_ok[:, None], other=0.0)
    if CHECK_INNER:
        return tl.load(at, mask=inner_ok[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def store_tile(ptr, tile, outer, inner, stride, inside_outer, inner_end, CHECK_INNER: tl.constexpr):
    """Counterpart of `load_tile`; rows where `inside_outer` is false are left alone."""
    inside = inside_outer[:, None]
    if CHECK_INNER:
        inside = inside & (inner < inner_end)[None, :]
    tl.store(
        ptr + outer[:, None] * stride + inner[None, :], tile.to(ptr.dtype.element_ty), mask=inside
    )


@triton.jit
def tile_rows(T, BM: tl.constexpr):
    """Rows of this program: clamped indices (loads need no mask), and which are real."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    return tl.minimum(rows, T - 1).to(tl.int64), rows < T


@triton.jit
def route(expert_ptr, rows, inside, E: tl.constexpr, ROUTED: tl.constexpr):
    """Expert of each row, and the lowest and highest expert of the tile (-1: none)."""
    if ROUTED:
        ids = tl.load(expert_ptr + rows)
        low = tl.min(tl.where(inside, ids, E), 0)
        high = tl.max(tl.where(inside, ids, -1), 0)
    else:
        ids = tl.zeros_like(rows).to(tl.int32)
        low = 0
        high = 0
    return ids, low, high


@triton.jit
def pick(wide, ids, EP: tl.constexpr, BM: tl.constexpr, MP: tl.constexpr):
    """``[BM, EP * MP]`` -> ``[BM, MP]``: each row's own expert, zero for rows without one."""
    mine = ids[:, None] == tl.arange(0, EP)[None, :]
    by_expert = tl.reshape(wide, (BM, EP, MP))
    return tl.sum(tl.where(mine[:, :, None], by_expert, 0.0), 1)


@triton.jit
def place(narrow, ids, EP: tl.constexpr, BM: tl.constexpr, MP: tl.constexpr):
    """Counterpart of `pick`: zeros in the columns of other experts."""
    mine = ids[:, None] == tl.arange(0, EP)[None, :]
    by_expert = tl.where(mine[:, :, None], narrow[:, None, :], 0.0)
    return tl.reshape(by_expert, (BM, EP * MP))


@triton.jit
def diagonal(square, BM: tl.constexpr):
    """The diagonal of a ``[BM, BM]`` tile."""
    rows = tl.arange(0, BM)
    return tl.sum(tl.where(rows[:, None] == rows[None, :], square, 0.0), 1)


@triton.jit
def sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


def block(size: int) -> int:
    """Smallest block that covers `size`: a power of two, at least 16 (what a dot takes)."""
    return max(16, triton.next_power_of_2(size))


WIDEST = 128
"""Up to this many (expert, rank) columns a tile with several experts is computed in one pass."""


def padded_experts(experts: int, rank: int) -> int:
    """Experts padded to a power of two if all fit side by side; 0: one after the other."""
    padded = triton.next_power_of_2(experts)
    return padded if experts > 1 and padded * padded_rank(rank) <= WIDEST else 0


def stages_within(stages: int, bytes_per_stage: int, kilobytes: int = 208) -> int:
    """`stages`, or as many as fit into shared memory: what a loop loads depends on the call."""
    return max(1, min(stages, kilobytes * 1024 // max(1, bytes_per_stage)))


def padded_rank(rank: int) -> int:
    """Ranks are padded to a power of two; zero columns stay zero through silu(0) * 0."""
    return block(rank)
