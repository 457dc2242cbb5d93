"""`modality_gate` in Triton."""

from torch import Tensor

from mmadapt.kernels.modality_gate import triton_backward, triton_forward
from mmadapt.ops._allocate import gradient
from mmadapt.ops._backends.triton._configs import tiles
from mmadapt.ops._backends.triton._device import unsupported_device


def unsupported(value: Tensor, logits: Tensor, mask: Tensor) -> str | None:
    return unsupported_device("value", value)


def forward(value: Tensor, logits: Tensor, mask: Tensor) -> Tensor:
    y, nothing = value.new_empty(value.shape), value.new_empty(0)
    triton_forward.forward(value, logits, mask, y, nothing, _tiles("modality_gate_fwd", value))
    return y


def inplace(value: Tensor, logits: Tensor, mask: Tensor, save: bool) -> Tensor:
    saved = gradient(value, save)
    triton_forward.forward(value, logits, mask, value, saved, _tiles("modality_gate_fwd", value))
    return saved


def backward(
    dy: Tensor, value: Tensor, logits: Tensor, mask: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    dvalue, dlogits = gradient(value, needs[0]), gradient(logits, needs[1])
    config = _tiles("modality_gate_bwd", value)
    triton_backward.backward(dy, value, logits, mask, dvalue, dlogits, config)
    return dvalue, dlogits


def _tiles(kernel: str, value: Tensor):
    _, heads, size = value.shape
    return tiles(kernel, value, value_tiles(value, tokens=8), heads=heads, size=size)


def value_tiles(value: Tensor, tokens: int, least_heads: int = 1) -> dict[str, int]:
    """A group of heads about 1024 columns wide, read in pieces of 16 KB by 4 warps.

    That is 128 bytes a thread in flight, without spills where rows are gated.
    """
    _, heads, size = value.shape
    piece = 16384 // value.element_size() // tokens
    # Gating is arithmetic in fp32, and masks cost registers: smaller pieces there.
    gated = piece // (value.element_size() // 2) // (1 if size & (size - 1) == 0 else 4)
    group = min(power_of_2(heads), max(1024 // power_of_2(size), 1), 16)
    group = max(group, least_heads)
    return {
        "BT": tokens,
        "HB": group,
        "BC": min(power_of_2(size), max(gated // group, 1)),
        "BW": min(power_of_2(group * size), piece),
        "num_warps": 4,
    }


def power_of_2(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()
