"""The adapter's weights as the kernels read them: activation dtype, norm weight multiplied in.

Every tile of rows reads all weights, so halving fp32 weights once costs less than reading them in
fp32 everywhere (bench/NOTES.md). The product with the norm's weight is fp32, rounded once.
"""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["count"])
def pack_kernel(
    a_ptr, b_ptr, weight_ptr, packed_a_ptr, packed_b_ptr, count,
    D: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Two arrays of rows of length D (b may be absent), each element times weight[column]."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    factor = tl.zeros((BLOCK,), tl.float32) + 1.0
    if NORM:
        factor = tl.load(weight_ptr + at % D, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(2):
        source, target = (a_ptr, packed_a_ptr) if part == 0 else (b_ptr, packed_b_ptr)
        if source is not None:
            value = tl.load(source + at, mask=inside, other=0.0).to(tl.float32) * factor
            tl.store(target + at, value.to(target.dtype.element_ty), mask=inside)


def pack(x: Tensor, a: Tensor, b: Tensor | None, norm_weight: Tensor | None) -> list[Tensor]:
    """`a` and `b` of equal shape ``[..., d]`` in the dtype of `x`, times ``norm_weight [d]``."""
    packed = [x.new_empty(t.shape) for t in (a, b) if t is not None]
    block = 1024
    pack_kernel[(triton.cdiv(a.numel(), block),)](
        a, b, norm_weight, packed[0], packed[-1] if b is not None else None, a.numel(),
        D=a.shape[-1], NORM=norm_weight is not None, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return packed
