"""`swiglu_adapter` in Triton: what the kernels can serve, the tiles they use, the launches.

"swiglu_adapter.forward" and "swiglu_adapter.backward" take these settings: ``fused`` (1: one
kernel; 0: project, then expand), BM rows, BK columns while projecting, BN while expanding,
``warps``, pipeline depths ``stages_k`` and ``stages_n`` (or what fits); for the halves also BR
ranks a block, ``splits`` of d, column ``groups``, and in the backward ``tiled`` (1: dz is tiled
too; for one expert, or more than fit side by side). "swiglu_adapter.weights" takes BD columns of x,
at most BC (expert, rank) columns, BT tokens a step, ``programs`` to aim at, ``warps``, ``stages``.
"""

import sys
from collections.abc import Mapping

import torch
import triton
from torch import Tensor

from mmadapt.kernels.common.device import on_device
from mmadapt.kernels.swiglu_adapter.triton_backward import launch_backward
from mmadapt.kernels.swiglu_adapter.triton_forward import launch_forward
from mmadapt.kernels.swiglu_adapter.triton_pack import pack
from mmadapt.kernels.swiglu_adapter.triton_tiles import padded_experts, padded_rank
from mmadapt.kernels.swiglu_adapter.triton_weights import launch_gate_down, launch_up
from mmadapt.ops._allocate import swiglu_adapter_gradients, swiglu_adapter_outputs
from mmadapt.ops._backends.triton._configs import tiles
from mmadapt.ops._backends.triton._device import dot_precision, unsupported_device

MAX_RANK = 256


def unsupported(
    x: Tensor,
    gate: Tensor,
    down: Tensor,
    up: Tensor,
    expert: Tensor | None,
    norm_weight: Tensor | None,
) -> str | None:
    """The constraint that rules this backend out, or None."""
    if (reason := unsupported_device("x", x)) is not None:
        return reason
    if gate.shape[1] > MAX_RANK:
        return f"rank {gate.shape[1]} is larger than {MAX_RANK}"
    if min(gate.shape) == 0:
        return f"gate has no elements: {list(gate.shape)}"
    if len({t.dtype for t in (gate, down, up)}) > 1:
        return "gate, down and up differ in dtype"
    return None


def forward(
    x: Tensor,
    gate: Tensor,
    down: Tensor,
    up: Tensor,
    expert: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    residual: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y [T, d], zg [T, m], zd [T, m], rstd [T] or [0]; see the reference backend."""
    outputs = swiglu_adapter_outputs(x, gate, norm_weight)
    if x.numel() == 0:
        return outputs
    with on_device(x):
        gate, down, up = _packed(x, gate, down, up, norm_weight)
        launch_forward(
            x, gate, down, up, expert, norm_weight, eps, residual, scale, outputs,
            _tiles("forward", x, gate), dot_precision(x.dtype),
        )  # fmt: skip
    return outputs


def backward(
    dy: Tensor,
    x: Tensor,
    gate: Tensor,
    down: Tensor,
    up: Tensor,
    expert: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    zg: Tensor,
    zd: Tensor,
    rstd: Tensor,
    residual: str,
    scale: float,
    needs: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dgate, ddown, dup, dnorm; size 0 and not computed where `needs` is false."""
    gradients = swiglu_adapter_gradients(x, gate, down, up, norm_weight, needs)
    dx = gradients[0]
    if x.numel() == 0:
        for gradient in gradients:
            gradient.zero_()
        return gradients
    dz, h = for_weights(x, gate, up, norm_weight, needs)
    precision = dot_precision(x.dtype)
    with on_device(x):
        gate_n, down_n, up_n = _packed(x, gate, down, up, norm_weight)
        launch_backward(
            dy, x, gate_n, down_n, up_n, expert, norm_weight, (zg, zd, rstd), residual, scale,
            dx, dz, h, _tiles("backward", x, gate), precision,
        )  # fmt: skip
        weight_gradients(
            dy, x, gate, down, expert, norm_weight, rstd, residual, dz, h, gradients, needs
        )
    return gradients


def for_weights(
    x: Tensor, gate: Tensor, up: Tensor, norm_weight: Tensor | None, needs: tuple[bool, ...]
) -> tuple[Tensor, Tensor]:
    """dz ``[2, T, .]`` (of gate and down, times rstd) and h ``[T, .]`` (times scale), not filled.

    What the pass over dx leaves for `weight_gradients`; of size 0 where nobody needs it. The last
    dimension is m, or where all experts fit side by side m for each of them.
    """
    through_z = needs[1] or needs[2] or (norm_weight is not None and needs[4])
    experts, rank = gate.shape[:2]
    widths = [rank * (n if padded_experts(n, rank) else 1) for n in (experts, up.shape[0])]
    dz = x.new_empty(2, x.shape[0], widths[0]) if through_z else x.new_empty(0)
    return dz, x.new_empty(x.shape[0], widths[1]) if needs[3] else x.new_empty(0)


def weight_gradients(
    dy: Tensor,
    x: Tensor,
    gate: Tensor,
    down: Tensor,
    expert: Tensor | None,
    norm_weight: Tensor | None,
    rstd: Tensor,
    residual: str,
    dz: Tensor,
    h: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    needs: tuple[bool, ...],
) -> None:
    """Fill dgate, ddown, dup and dnorm from dz and h (`for_weights`)."""
    _, dgate, ddown, dup, dnorm = gradients
    settings, precision = _tiles("weights", x, gate), dot_precision(x.dtype)
    if dz.numel():
        norm = None if norm_weight is None else (norm_weight, rstd, dy)
        launch_gate_down(
            x, dz, gate, down, expert, norm, dgate, ddown, dnorm, settings, precision,
            residual == "norm",
        )  # fmt: skip
    if needs[3]:
        launch_up(dy, h, expert, dup, settings, precision)


def _packed(
    x: Tensor, gate: Tensor, down: Tensor, up: Tensor, norm_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """gate and down with the norm's weight in them, and up, all in the dtype of `x`."""
    if norm_weight is not None or gate.dtype != x.dtype:
        gate, down = pack(x, gate, down, norm_weight)
    if up.dtype != x.dtype:
        (up,) = pack(x, up, None, None)
    return gate, down, up


def _tiles(part: str, x: Tensor, gate: Tensor) -> Mapping[str, int]:
    tokens, dim = x.shape
    rank = padded_rank(gate.shape[1])
    bucket = triton.next_power_of_2(tokens)
    default = DEFAULTS[part](x.dtype, bucket, dim, rank)
    experts = min(2, gate.shape[0])  # one, or routed
    return tiles(
        f"swiglu_adapter.{part}", x, default, tokens=bucket, dim=dim, rank=rank, experts=experts
    )


def _default_forward(dtype: torch.dtype, tokens: int, dim: int, rank: int) -> dict[str, int]:
    if dtype == torch.float32:  # products without tensor cores: registers are what is short
        return _halves(tokens, dim, rank, BM=32, BK=32, BN=32, BR=32, warps=4, stages=2)
    if rank > 128:
        return _halves(tokens, dim, rank, BM=64, BK=64, BN=32, BR=64, warps=8, stages=2)
    if tokens < 8192:
        return _halves(tokens, dim, rank, BM=64, BK=128, BN=64, BR=64, warps=8, stages=3)
    if rank > 64:
        return {"fused": 1, "BM": 64, "BK": 64, "BN": 32, "warps": 8, "stages_k": 3, "stages_n": 3}
    return {"fused": 1, "BM": 64, "BK": 128, "BN": 128, "warps": 8, "stages_k": 4, "stages_n": 3}


def _halves(
    tokens: int, dim: int, rank: int, *, BM: int, BK: int, BN: int, BR: int, warps: int, stages: int
) -> dict[str, int]:
    """Two launches; d is split so that about 128 programs run (a constant, not the GPU's size)."""
    row_tiles = max(1, tokens // BM)
    blocks = max(1, rank // BR)
    splits = 1
    while splits < 8 and row_tiles * blocks * splits < 128 and dim >= 2 * splits * BK:
        splits *= 2
    groups = 1
    while groups < 16 and row_tiles * groups < 128 and dim >= 2 * groups * BN:
        groups *= 2
    return {
        "fused": 0, "BM": BM, "BK": BK, "BN": BN, "BR": BR, "warps": warps, "splits": splits,
        "groups": groups, "stages_k": stages, "stages_n": stages,
    }  # fmt: skip


def _default_weights(dtype: torch.dtype, tokens: int, dim: int, rank: int) -> dict[str, int]:
    if dtype == torch.float32:
        return {"BD": 32, "BC": 32, "BT": 32, "programs": 512, "warps": 4, "stages": 2}
    return {"BD": 128, "BC": 64, "BT": 64, "programs": 256, "warps": 8, "stages": 3}


def _default_backward(dtype: torch.dtype, tokens: int, dim: int, rank: int) -> dict[str, int]:
    if dtype == torch.float32 or rank <= 128:
        return _default_forward(dtype, tokens, dim, rank)
    return {
        "fused": 0, "tiled": 1, "BM": 128, "BK": 64, "BN": 128, "BR": 64, "warps": 8,
        "splits": 1, "groups": 1, "stages_k": 4, "stages_n": 3,
    }  # fmt: skip


DEFAULTS = {
    "forward": _default_forward,
    "backward": _default_backward,
    "weights": _default_weights,
}
"""Settings where no measured table has any: chosen for Hopper, safe everywhere."""


def tuning_targets(size: tuple[int, int, int], dtype: torch.dtype, device: str):
    """What `mmadapt.ops.tune` walks for a problem of (tokens, dim, rank)."""
    from mmadapt.ops._backends.triton import _swiglu_tuning

    return _swiglu_tuning.tuning_targets(sys.modules[__name__], size, dtype, device)
