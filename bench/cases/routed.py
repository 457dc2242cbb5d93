"""SwiGLU adapter routed over experts, norm fused: PILL's block. Shapes are T x d x m.

Variants ``input``: y = x + A_e(norm(x)); ``norm``: y = norm(x) + A_e(norm(x)). Flags: ``frozen``,
the norm's weight gets no gradient, as in PILL; ``shared``, one up for all experts (CROME);
``fp32``, master weights; ``E<n>`` experts (default 2); ``image<percent>`` of the tokens, in runs of
``run<length>``. Bytes as in `bench.cases.adapter`; flops count one expert a token.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from bench.case import BOTH, ELEMENT, FORWARD, Case, Provider, compiled_both, copy_of, registered
from bench.cases import EPS, Draw, Variant, image_of, parse_variant
from mmadapt.kernels.swiglu_adapter import reference
from mmadapt.ops import swiglu_adapter

LENGTHS = (3,)
GRIDS = {
    "default": [(8192, 4096, 32), (8192, 4096, 64), (16384, 2048, 32)],
    "subset": [(8192, 4096, 32)],
    "tokens": [(t, 4096, 32) for t in (512, 2048, 8192, 16384, 65536)],
}
VARIANTS = (
    "input", "norm", "norm-frozen", "input-fp32", "norm-fp32", "norm-shared", "input-E1",
    "norm-E4-image50-run8", "norm-image0", "norm-image100",
)  # fmt: skip
"""Some of the grammar's, for tests and for reading."""
DEFAULT_VARIANTS = ("input", "norm")
EXPERTS = 2


def parse(variant: str) -> Variant:
    flags, numbers = ("frozen", "fp32", "shared"), ("E", "image", "run")
    return parse_variant(variant, ("input", "norm"), flags, numbers)


def build(
    shape: tuple[int, int, int], variant: str, dtype: torch.dtype, device: torch.device
) -> Case:
    tokens, dim, rank = shape
    options = parse(variant)
    residual, experts = options.kind, options.get("E", EXPERTS)
    draw = Draw(device, dtype, torch.float32 if "fp32" in options else dtype)
    parameters = {
        "gate": draw.weight(experts, rank, dim),
        "down": draw.weight(experts, rank, dim),
        "up": draw.weight(1 if "shared" in options else experts, dim, rank),
    }
    norm = {"weight": draw.weight(dim, mean=1.0, std=0.1)}
    frozen = norm if "frozen" in options else {}
    parameters |= {} if frozen else norm
    expert = experts_of(options, tokens, device)
    moved = ELEMENT[dtype] * tokens * dim
    weights = sum(p.nbytes for p in (*parameters.values(), *frozen.values()))
    flops = 6.0 * tokens * dim * rank
    return Case(
        suite="routed",
        label=f"{tokens} x {dim}, m={rank}, E={experts}, {variant}",
        shape={"tokens": tokens, "dim": dim, "rank": rank, "experts": experts, "variant": variant},
        dtype=dtype,
        activations={"x": draw.activation(tokens, dim)},
        parameters=parameters,
        frozen=frozen,
        per_token={"expert": expert},
        eager="where",
        providers={
            "copy": copy_of("x"),
            "where": Provider(where(residual)),
            "eager-packed": Provider(eager_packed(residual)),
            "index": Provider(sorted_by_expert(residual, expert, experts, per_expert)),
            "grouped-mm": Provider(
                sorted_by_expert(residual, expert, experts, grouped), skip=no_grouped(dtype)
            ),
            **compiled_both(where(residual)),
            **registered("swiglu_adapter", lambda name: operator(residual, name), device),
        },
        exact=exact(residual),
        moved={FORWARD: 2.0 * moved + weights, BOTH: 6.0 * moved + 3.0 * weights},
        flops={FORWARD: flops, BOTH: 3 * flops},
    )


def experts_of(options: Variant, tokens: int, device: torch.device) -> Tensor:
    """Int32 [T]: 0 for text; image runs take the other experts in turn."""
    image = image_of(options, tokens, device)
    others = max(1, options.get("E", EXPERTS) - 1)
    starts = image & ~torch.cat((image.new_zeros(1), image[:-1]))
    turn = 1 + (starts.cumsum(0) - 1).clamp_min(0) % others
    ids = torch.where(image, turn, 0)
    return ids.clamp_max(options.get("E", EXPERTS) - 1).to(torch.int32)


def where(residual: str) -> Callable[..., Tensor]:
    """The authors' form: all experts for all tokens, then a choice by a [T, d] mask."""

    def run(
        x: Tensor, gate: Tensor, down: Tensor, up: Tensor, weight: Tensor, expert: Tensor
    ) -> Tensor:
        gate, down, up = (w.to(x.dtype) for w in (gate, down, up))
        up = up.expand(gate.shape[0], -1, -1)
        n = reference.rms_norm(x, weight.to(x.dtype), EPS)
        first, *others = (
            linear(silu(linear(n, gate[e])) * linear(n, down[e]), up[e])
            for e in range(gate.shape[0])
        )
        for e, other in enumerate(others, start=1):
            first = torch.where((expert == e).unsqueeze(-1).expand(x.shape), other, first)
        return (x if residual == "input" else n) + first

    return run


def eager_packed(residual: str) -> Callable[..., Tensor]:
    """All experts in one product each way; hidden units of the other expert are zeroed between."""

    def run(
        x: Tensor, gate: Tensor, down: Tensor, up: Tensor, weight: Tensor, expert: Tensor
    ) -> Tensor:
        gate, down, up = (w.to(x.dtype) for w in (gate, down, up))
        experts, rank = gate.shape[:2]
        up = up.expand(experts, -1, -1)
        n = rms_norm(x, x.shape[-1:], weight.to(x.dtype), EPS)
        pre_gate, pre_down = linear(n, torch.cat((gate.flatten(0, 1), down.flatten(0, 1)))).chunk(
            2, -1
        )
        ids = torch.arange(experts, device=x.device).repeat_interleave(rank)
        hidden = silu(pre_gate) * pre_down * (expert.unsqueeze(-1) == ids)
        base = x if residual == "input" else n
        return torch.addmm(base, hidden, up.transpose(1, 2).flatten(0, 1))

    return run


def sorted_by_expert(
    residual: str, expert: Tensor, experts: int, apply: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """Rows gathered by expert, each through its own, put back. The order is built once a batch."""
    order = torch.argsort(expert, stable=True)
    back = torch.argsort(order)
    counts = torch.bincount(expert, minlength=experts)
    ends, sizes = counts.cumsum(0).to(torch.int32), counts.tolist()

    def run(
        x: Tensor, gate: Tensor, down: Tensor, up: Tensor, weight: Tensor, expert: Tensor
    ) -> Tensor:
        gate, down, up = (w.to(x.dtype) for w in (gate, down, up))
        n = rms_norm(x, x.shape[-1:], weight.to(x.dtype), EPS)
        rows = apply(
            n.index_select(0, order), gate, down, up.expand(gate.shape[0], -1, -1), sizes, ends
        )
        return (x if residual == "input" else n) + rows.index_select(0, back)

    return run


def per_expert(
    rows: Tensor, gate: Tensor, down: Tensor, up: Tensor, sizes: list[int], ends: Tensor
) -> Tensor:
    """A loop over experts."""
    parts = [
        linear(silu(linear(part, gate[e])) * linear(part, down[e]), up[e])
        for e, part in enumerate(rows.split(sizes))
    ]
    return torch.cat(parts)


def grouped(
    rows: Tensor, gate: Tensor, down: Tensor, up: Tensor, sizes: list[int], ends: Tensor
) -> Tensor:
    """torch's grouped GEMM: two launches whatever the number of experts."""
    both = torch.cat((gate, down), 1).transpose(1, 2)
    pre_gate, pre_down = torch._grouped_mm(rows, both, offs=ends).chunk(2, -1)
    up = up.contiguous().transpose(1, 2)
    return torch._grouped_mm(silu(pre_gate) * pre_down, up, offs=ends)


def no_grouped(dtype: torch.dtype) -> str | None:
    if not hasattr(torch, "_grouped_mm"):
        return f"torch {torch.__version__} has no grouped GEMM"
    return None if dtype == torch.bfloat16 else "torch's grouped GEMM takes bf16 only"


def operator(residual: str, backend: str) -> Callable[..., Tensor]:
    def run(
        x: Tensor, gate: Tensor, down: Tensor, up: Tensor, weight: Tensor, expert: Tensor
    ) -> Tensor:
        return swiglu_adapter(
            x, gate, down, up, expert=expert, norm=(weight, EPS), residual=residual, backend=backend
        )

    return run


def exact(residual: str) -> Callable[..., Tensor]:
    def run(
        x: Tensor, gate: Tensor, down: Tensor, up: Tensor, weight: Tensor, expert: Tensor
    ) -> Tensor:
        return reference.swiglu_adapter(
            x, gate, down, up, expert=expert, norm=(weight, EPS), residual=residual
        )

    return run
