"""A plain product, to see that the sm_90 check tells good tiles from bad ones."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["rows"])
def product_kernel(
    a_ptr, b_ptr, c_ptr, rows, N: tl.constexpr, K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    j = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    k = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        a = tl.load(a_ptr + i * K + (start + k)[None, :], mask=i < rows)
        b = tl.load(b_ptr + (start + k)[:, None] * N + j)
        acc = tl.dot(a, b, acc)
    tl.store(c_ptr + i * N + j, acc, mask=i < rows)


def product(a: Tensor, b: Tensor, c: Tensor, bm: int, bn: int, bk: int, stages: int) -> None:
    (rows, inner), columns = a.shape, b.shape[1]
    grid = (triton.cdiv(rows, bm), columns // bn)
    product_kernel[grid](
        a, b, c, rows, columns, inner, bm, bn, bk, num_warps=4, num_stages=stages
    )  # fmt: skip
