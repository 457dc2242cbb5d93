r"""Every operator of the CUDA backend on a few shapes, forward and backward, against the reference.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
        python -m tests.cuda.sanitize [--quick] [--portable] [OPERATOR...]

and likewise racecheck, initcheck and synccheck (`make sanitize` runs all four). Shapes are small,
since the sanitizer slows kernels down a hundredfold, and ragged, since that is where kernels read
past an end: none a multiple of a tile, tails of one row, one token, no masked token. Operands are
drawn, and the reference computed, on the CPU: on the GPU run the kernels under test, and little
else. --quick takes every fifth problem, a minute instead of four; --portable runs swiglu_adapter's
portable kernels on a Hopper GPU too. Exit status 1 if a result is off; a shape that a backend
refuses is named. Without a GPU: says so, exit status 2.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mmadapt.ops import (
    BackendError,
    backends,
    cp_linear,
    modality_gate,
    projected_modality_gate,
    swiglu_adapter,
)
from mmadapt.ops._backends import load
from mmadapt.ops._backends.triton._configs import override

DEVICE = "cuda"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [(BF16, BF16), (BF16, FP32), (FP16, FP16), (FP32, FP32)]
TOLERANCE = {BF16: 2**-6, FP16: 2**-8, FP32: 1e-4}
"""Of the relative error. This looks for faults of memory; the tests for those of numbers."""

QUICK = 5
"""Coprime to how often dtypes, routing and the like recur, so that all of them come up."""

Call = Callable[..., Tensor]
# label, leaves, tensors without gradient, (leaves, those, backend) -> y
Problem = tuple[str, list[Tensor], list[Tensor | None], Call]


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(shape) / max(shape[-1], 1) ** 0.5).to(dtype)


def activations(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype)


def gates() -> Iterator[Problem]:
    shapes = [(1, 1, 1), (37, 3, 5), (300, 4, 64), (65, 33, 16), (40, 2, 520)]
    for (tokens, heads, size), (dtype, wide), inplace, share in itertools.product(
        shapes, DTYPES, (False, True), (0.0, 0.4)
    ):
        mask = torch.rand(tokens) < share
        value = activations(tokens, heads, size, dtype=dtype)
        for per_token in (False, True):
            logits = draw(*(tokens, heads) if per_token else (heads,), dtype=wide)

            def call(value, logits, mask, backend, inplace=inplace):
                value = value * 1 if inplace else value
                return modality_gate(value, logits, mask, inplace=inplace, backend=backend)

            label = f"{tokens}x{heads}x{size} {dtype} {wide} inplace={inplace} masked={share}"
            yield f"{label} per_token={per_token}", [value, logits], [mask], call


def projected_gates() -> Iterator[Problem]:
    shapes = [(1, 1, 1, 1), (37, 3, 5, 20), (300, 4, 64, 264), (65, 33, 16, 320), (50, 70, 8, 70)]
    shapes.append((8199, 1, 8, 16))  # more than a block lists at a time
    for (tokens, heads, size, width), (dtype, wide), inplace, share in itertools.product(
        shapes, DTYPES, (False, True), (0.0, 0.4)
    ):
        mask = torch.rand(tokens) < share
        value = activations(tokens, heads, size, dtype=dtype)
        hidden = activations(tokens, width, dtype=dtype)

        def call(value, hidden, weight, mask, backend, inplace=inplace):
            value = value * 1 if inplace else value
            return projected_modality_gate(
                value, hidden, weight, mask, inplace=inplace, backend=backend
            )

        label = f"{tokens}x{heads}x{size} width={width} {dtype} {wide} inplace={inplace}"
        leaves = [value, hidden, draw(heads, width, dtype=wide)]
        yield f"{label} masked={share}", leaves, [mask], call


def adapters() -> Iterator[Problem]:
    shapes = [(1, 64, 16), (65, 256, 32), (131, 392, 64), (130, 512, 128)]
    for (tokens, dim, rank), (dtype, wide), experts, with_norm in itertools.product(
        shapes, DTYPES, (1, 2), (False, True)
    ):
        expert = torch.randint(-1, experts, (tokens,)) if experts > 1 else None
        leaves = [activations(tokens, dim, dtype=dtype)]
        leaves += [draw(experts, rank, dim, dtype=wide), draw(experts, rank, dim, dtype=wide)]
        leaves += [draw(experts, dim, rank, dtype=wide)]
        if with_norm:
            leaves.append(1 + 0.1 * draw(dim, dtype=wide))

        def call(x, gate, down, up, *rest):
            *norm, expert, backend = rest
            settings = {"norm": (norm[0], 1e-5), "residual": "norm"} if norm else {}
            return swiglu_adapter(x, gate, down, up, expert=expert, backend=backend, **settings)

        yield (
            f"{tokens}x{dim}x{rank} {dtype} {wide} experts={experts} norm={with_norm}",
            leaves,
            [expert],
            call,
        )


def cp_linears() -> Iterator[Problem]:
    shapes = [(1, 64, 64, 16), (65, 256, 192, 32), (193, 1032, 520, 64)]
    # Mode matrix, settings gemm, fused and tile, more ranks (fused: padded to 128 instead of 64).
    ways = [(0, 0, 0, 0, 0), (1, 0, 0, 0, 0)]
    ways += [(dense, 1, 0, tile, 0) for dense, tile in ((0, 128), (1, 192), (0, 256))]
    ways += [(0, 1, 1, tile, more) for tile in (128, 192, 256) for more in (0, 64)]
    for (tokens, dim, out, rank), (dtype, wide), way in itertools.product(shapes, DTYPES, ways):
        dense, gemm, fused, tile, more = way
        rank += more
        weight, bias = draw(out, dim, dtype=dtype), draw(out, dtype=dtype)
        leaves = [activations(tokens, dim, dtype=dtype), draw(rank, dim, dtype=wide)]
        leaves += [draw(out, rank, dtype=wide), draw(*[rank] * (1 + dense), dtype=wide)]

        def call(x, factor_in, factor_out, mode, weight, bias, backend):
            return cp_linear(x, weight, bias, factor_in, factor_out, mode, backend=backend)

        label = f"{tokens}x{dim}x{out}x{rank} {dtype} {wide} dense={dense} gemm={gemm}"
        label += f" fused={fused} tile={tile}"
        yield label, leaves, [weight, bias], call


PROBLEMS = {
    "modality_gate": gates,
    "projected_modality_gate": projected_gates,
    "cp_linear": cp_linears,
    "swiglu_adapter": adapters,  # last, as racecheck and initcheck take longest with it
}


def results(
    call: Call, leaves: list[Tensor], others: list[Tensor | None], dy: Tensor | None, backend: str
) -> list[Tensor]:
    """Output and every gradient, on the CPU; the reference is computed there too."""
    device = "cpu" if backend == "reference" else DEVICE
    fresh = [t.to(device, copy=True).requires_grad_() for t in leaves]
    y = call(*fresh, *(None if t is None else t.to(device) for t in others), backend)
    dy = torch.ones_like(y) if dy is None else dy.to(device)
    return [t.detach().cpu() for t in (y, *torch.autograd.grad(y, fresh, dy))]


def off(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    error = (actual.float() - expected.float()).norm()
    return not bool(error <= tolerance * expected.float().norm() + 1e-6)


def run(op: str, every: int) -> tuple[int, int, list[str]]:
    """How many problems ran, how many were refused, and what was off."""
    ran, refused, faults = 0, 0, []
    for label, leaves, others, call in itertools.islice(PROBLEMS[op](), 0, None, every):
        dy = None if "cp" in op else activations(*leaves[0].shape, dtype=leaves[0].dtype)
        print(f"{op} {label}", end="", flush=True)  # a fault that ends the process has a name
        # cp_linear: the GEMM here, with or without z, or cuBLAS, always chosen for so few rows.
        way = {"gemm": int("gemm=1" in label), "fused": int("fused=1" in label)}
        way["tile"] = int(label.partition("tile=")[2] or 0)
        try:
            with override({"cp_linear.cuda": way, "cp_linear.cuda_backward": way}):
                actual = results(call, leaves, others, dy, "cuda")
        except BackendError as error:
            print(f": refused: {error}", flush=True)
            refused += 1
            continue
        expected = results(call, leaves, others, dy, "reference")
        wrong = [
            "output" if index == 0 else f"gradient {index - 1}"
            for index, pair in enumerate(zip(actual, expected, strict=True))
            if off(*pair, TOLERANCE[leaves[0].dtype])
        ]
        print(f": {', '.join(wrong)} off" if wrong else "", flush=True)
        faults += [f"{op} {label}: {name}" for name in wrong]
        ran += 1
    return ran, refused, faults


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("operators", nargs="*", choices=[*PROBLEMS, []], default=[])
    parser.add_argument("--quick", action="store_true", help="every fifth problem")
    parser.add_argument("--portable", action="store_true", help="swiglu_adapter without wgmma")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no GPU here")
        return 2
    if arguments.portable:
        load("mmadapt.ops._backends.cuda.swiglu_adapter").kernels = lambda *operands: "portable"
    torch.manual_seed(0)
    faults = []
    for op in arguments.operators or PROBLEMS:
        reason = backends(op).get("cuda", "there is none")
        if reason is not None:
            print(f"{op}: no cuda backend: {reason}")
            continue
        ran, refused, wrong = run(op, QUICK if arguments.quick else 1)
        print(f"{op}: {ran} problems ran, {refused} refused, {len(wrong)} results off", flush=True)
        faults += wrong
    for line in faults:
        print(f"OFF {line}")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
