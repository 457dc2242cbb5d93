"""`projected_modality_gate` in Triton."""

from torch import Tensor

from mmadapt.kernels.modality_gate import triton_forward, triton_projected_backward
from mmadapt.ops._allocate import (
    gradient,
    projected_modality_gate_inplace_outputs,
    projected_modality_gate_outputs,
)
from mmadapt.ops._backends.triton._configs import tiles
from mmadapt.ops._backends.triton._device import dot_precision, unsupported_device
from mmadapt.ops._backends.triton.modality_gate import power_of_2, value_tiles


def unsupported(value: Tensor, hidden: Tensor, weight: Tensor, mask: Tensor) -> str | None:
    return unsupported_device("value", value)


def forward(value: Tensor, hidden: Tensor, weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    y, gate = projected_modality_gate_outputs(value)
    _forward(value, hidden, weight, mask, y, gate, value.new_empty(0))
    return y, gate


def inplace(
    value: Tensor, hidden: Tensor, weight: Tensor, mask: Tensor, save: bool
) -> tuple[Tensor, Tensor]:
    saved, gate = projected_modality_gate_inplace_outputs(value, save)
    _forward(value, hidden, weight, mask, value, gate, saved)
    return saved, gate


def _forward(value, hidden, weight, mask, y, gate, saved) -> None:
    _, heads, size = value.shape
    width = hidden.shape[1]
    config = tiles(
        "projected_modality_gate_fwd", value, forward_tiles(value, width), heads=heads, size=size,
        width=width,
    )  # fmt: skip
    triton_forward.projected_forward(
        value, hidden, weight, mask, y, gate, saved, config, dot_precision(value.dtype)
    )


def forward_tiles(value: Tensor, width: int) -> dict[str, int]:
    """16 tokens and 8 heads, the least that fills a tensor-core product (m16n8k16): few masked
    tokens still occupy many SMs, 128 programs for 512 tokens in runs of 32 and 32 heads."""
    widest = 256 if value.element_size() == 2 else 64
    settings = {"BK": min(max(power_of_2(width), 16), widest), "STAGES": 4}
    return value_tiles(value, tokens=16, least_heads=8) | settings


def backward(
    dy: Tensor,
    value: Tensor,
    hidden: Tensor,
    weight: Tensor,
    mask: Tensor,
    gate: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    dvalue, dhidden, dweight = (
        gradient(t, n) for t, n in zip((value, hidden, weight), needs, strict=True)
    )
    _, heads, size = value.shape
    width = hidden.shape[1]
    config = tiles("modality_gate_bwd", value, value_tiles(value, tokens=8), heads=heads, size=size)
    projection = tiles(
        "projected_modality_gate_bwd", value, projection_tiles(value, heads, width), heads=heads,
        width=width,
    )  # fmt: skip
    triton_projected_backward.projected_backward(
        dy, value, hidden, weight, mask, gate, dvalue, dhidden, dweight, config, projection,
        dot_precision(value.dtype),
    )  # fmt: skip
    return dvalue, dhidden, dweight


def projection_tiles(value: Tensor, heads: int, width: int) -> dict[str, int]:
    """Exact fp32 products keep their operands in registers, hence the smaller tiles."""
    half = value.element_size() == 2
    most_heads = 64 if half and heads <= 64 else 32
    columns = min(max(power_of_2(width), 16), 128 if half else 64)
    # About 256 programs, two for each SM of an H100, whatever the width.
    runs = min(max(power_of_2(256 * columns // max(width, 1)), 8), 64)
    return {
        "BT": 32 if half else 16,
        "BD": columns,
        "BH": min(max(power_of_2(heads), 16), most_heads),
        "RUNS": runs,
        "num_warps": 4,
    }
