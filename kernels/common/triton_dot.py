"""Products of tiles with fp32 sums, for every dtype, on the GPU and in Triton's interpreter."""

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in fp32 (acc: None for 0), operands of one dtype.

    PRECISION is Triton's `input_precision`, or "widened" for the interpreter, which cannot multiply
    bf16. See `dot_precision` in mmadapt/ops/_backends/triton/_device.py.
    """
    if PRECISION == "widened":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    if PRECISION == "ieee":
        # Sums of a tile first: one long chain of fp32 additions loses to a library's blocks. As an
        # fma, because acc + dot would be folded into that chain again.
        part = tl.dot(a, b, input_precision="ieee")
        return part if acc is None else tl.fma(part, tl.full(part.shape, 1.0, tl.float32), acc)
    return tl.dot(a, b, acc, input_precision=PRECISION)
