"""What the tuner tries for the SwiGLU adapter's kernels."""

from collections.abc import Callable, Iterator

import torch
import triton
from torch import Tensor

from mmadapt.kernels.swiglu_adapter.triton_tiles import padded_rank

Target = tuple[str, dict[str, int], list[dict[str, int]], Callable[[], list[Tensor]]]


def tuning_targets(
    module, size: tuple[int, int, int], dtype: torch.dtype, device: str
) -> Iterator[Target]:
    """(kernel, dims, candidates, call) of the forward, the backward and the weight gradients.

    Twice: one expert without a norm; and two routed experts behind a fused norm that is also the
    base, a sixteenth of the tokens, in runs of 32, with the second.
    """
    for experts in (1, 2):
        yield from _problem(module, size, experts, dtype, device)


def _problem(
    module, size: tuple[int, int, int], experts: int, dtype: torch.dtype, device: str
) -> Iterator[Target]:
    tokens, dim, rank = size
    torch.manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype)

    x, dy = draw(tokens, dim), draw(tokens, dim)
    gate, down = (draw(experts, rank, dim, scale=dim**-0.5) for _ in range(2))
    up = draw(experts, dim, rank, scale=rank**-0.5)
    weight = expert = None
    residual = "input"
    if experts > 1:
        weight, residual = 1 + draw(dim, scale=0.1), "norm"
        expert = (torch.arange(tokens, device=device) % 512 < 32).int()
    operands = (x, gate, down, up, expert, weight)
    saved = module.forward(*operands, 1e-5, residual, 1.0)[1:]

    def forward() -> list[Tensor]:
        return list(module.forward(*operands, 1e-5, residual, 1.0))

    def backward(*needs: bool) -> list[Tensor]:
        return list(module.backward(dy, *operands, 1e-5, *saved, residual, 1.0, needs))

    padded = padded_rank(rank)
    dims = {
        "tokens": triton.next_power_of_2(tokens),
        "dim": dim,
        "rank": padded,
        "experts": experts,
    }
    passes = list(_passes(tokens, dim, padded))
    yield "swiglu_adapter.forward", dims, passes, forward
    if padded >= 64:  # four warps hold too few registers for 64 rows
        passes = [c for c in passes if c["warps"] == 8 or c["BM"] == 32]
    yield (
        "swiglu_adapter.backward", dims, [*passes, *_tiled(padded)],
        lambda: backward(True, False, False, False, False),
    )  # fmt: skip
    yield (
        "swiglu_adapter.weights", dims, list(_weights(padded * experts)),
        lambda: backward(False, True, True, True, False),
    )  # fmt: skip


def _passes(tokens: int, dim: int, rank: int) -> Iterator[dict[str, int]]:
    if rank <= 128:
        for bm, bk, bn, warps, deep, late in (
            (64, 64, 64, 4, 6, 5), (64, 64, 64, 4, 4, 4), (64, 64, 64, 8, 6, 5),
            (64, 64, 128, 4, 6, 3), (64, 128, 64, 4, 4, 3), (64, 128, 128, 4, 4, 3),
            (64, 128, 128, 8, 5, 4), (64, 128, 128, 8, 6, 5), (64, 128, 128, 4, 6, 4),
            (64, 128, 64, 8, 6, 5), (64, 64, 128, 8, 8, 4), (64, 64, 32, 8, 4, 4),
            (32, 64, 64, 4, 6, 4),
            (32, 128, 128, 4, 4, 3), (32, 256, 128, 4, 3, 3), (128, 64, 64, 8, 4, 4),
        ):  # fmt: skip
            yield {
                "fused": 1, "BM": bm, "BK": bk, "BN": bn, "warps": warps,
                "stages_k": deep, "stages_n": late,
            }  # fmt: skip
    if rank > 64 or tokens <= 4096:
        ranks = min(rank, 64)
        for bm, bk, bn, br, warps, deep, late in (
            (64, 128, 64, ranks, 8, 4, 4), (64, 64, 64, ranks, 4, 4, 4),
            (64, 64, 64, ranks, 8, 4, 4), (64, 64, 32, ranks, 8, 4, 3),
            (128, 64, 64, ranks, 8, 4, 3),
        ):  # fmt: skip
            for splits, groups in ((1, 1), (1, 2), (4, 4), (4, 8)):
                if tokens // bm * max(splits, groups) <= 640 and dim // splits >= 2 * bk:
                    yield {
                        "fused": 0, "BM": bm, "BK": bk, "BN": bn, "BR": br, "warps": warps,
                        "splits": splits, "groups": groups, "stages_k": deep, "stages_n": late,
                    }  # fmt: skip


def _tiled(rank: int) -> Iterator[dict[str, int]]:
    if rank >= 128:
        for bm, br, bn, warps, late in (
            (128, 64, 128, 8, 3),
            (64, 64, 128, 8, 3),
            (64, 64, 64, 4, 4),
        ):
            yield {
                "fused": 0, "tiled": 1, "BM": bm, "BK": 64, "BN": bn, "BR": br, "warps": warps,
                "splits": 1, "groups": 1, "stages_k": 4, "stages_n": late,
            }  # fmt: skip


def _weights(columns: int) -> Iterator[dict[str, int]]:
    for bd, bc, bt, programs, warps, stages in (
        (128, 64, 64, 256, 8, 3), (128, 64, 64, 256, 4, 3), (128, 64, 128, 256, 8, 3),
        (128, 64, 64, 512, 8, 3), (64, 64, 64, 512, 4, 4), (64, 64, 128, 512, 4, 3),
        (128, 128, 64, 256, 8, 3), (64, 128, 64, 256, 8, 3),
    ):  # fmt: skip
        if bc <= max(64, columns):
            yield {
                "BD": bd, "BC": bc, "BT": bt, "programs": programs, "warps": warps,
                "stages": stages,
            }  # fmt: skip
