"""The problems whose kernels must compile for sm_90 cleanly: the one list to extend.

`problems()` returns, per contract, representative calls of the backend's forward and backward
(default suite), the wide matrix (`slow`), and one problem for every entry of the shipped tables.
Tensors are on the meta device: shapes without memory, pointers that divide by 16 as torch's do.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
TRITON = "mmadapt.ops._backends.triton"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclasses.dataclass(frozen=True)
class Problem:
    """`call` runs the backend's functions; its launches are what is compiled."""

    contract: str
    label: str
    call: Callable[[], None]
    slow: bool = False
    shipped: bool = False
    """Made from an entry of a shipped table."""

    @property
    def name(self) -> str:
        return f"{self.contract} {self.label}"


def problems() -> list[Problem]:
    found = [*swiglu_adapter(), *cp_linear(), *gates(), *shipped(), *toys()]
    here = {
        c: importlib.util.find_spec(f"{TRITON}.{c}") is not None
        for c in {p.contract for p in found} - {"toy"}
    }
    return [p for p in found if here.get(p.contract, True)]


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def backend(contract: str) -> ModuleType:
    return importlib.import_module(f"{TRITON}.{contract}")


def short(dtype: torch.dtype) -> str:
    return {BF16: "bf16", FP16: "fp16", FP32: "fp32"}[dtype]


# swiglu_adapter


def swiglu(
    tokens: int,
    dim: int,
    rank: int,
    *,
    experts: int = 1,
    shared_up: bool = False,
    norm: bool = False,
    residual: str = "input",
    dtype: torch.dtype = BF16,
    weights: torch.dtype | None = None,
    needs: tuple[bool, ...] = (True,) * 5,
    slow: bool = False,
) -> Problem:
    wide = weights or dtype

    def call() -> None:
        module = backend("swiglu_adapter")
        x = meta(tokens, dim, dtype=dtype)
        gate, down = (meta(experts, rank, dim, dtype=wide) for _ in range(2))
        up = meta(1 if shared_up else experts, dim, rank, dtype=wide)
        expert = meta(tokens, dtype=torch.int32) if experts > 1 else None
        weight = meta(dim, dtype=wide) if norm else None
        operands = (x, gate, down, up, expert, weight, 1e-6)
        _, zg, zd, rstd = module.forward(*operands, residual, 1.0)
        module.backward(
            meta(tokens, dim, dtype=dtype), *operands, zg, zd, rstd, residual, 1.0, needs
        )

    flags = [
        f"{tokens}x{dim}x{rank}",
        short(dtype) if wide is dtype else f"{short(dtype)}/{short(wide)}",
        f"E={experts}{' shared' if shared_up else ''}" if experts > 1 else "",
        f"norm {residual}" if norm else "",
        "" if all(needs) else "needs " + "".join("01"[n] for n in needs),
    ]
    return Problem("swiglu_adapter", " ".join(f for f in flags if f), call, slow)


def swiglu_adapter() -> Iterator[Problem]:
    yield swiglu(8192, 4096, 32)
    yield swiglu(8192, 4096, 64)
    yield swiglu(8192, 4096, 32, experts=2, norm=True, residual="norm", weights=FP32)
    yield swiglu(2048, 4096, 32)
    yield swiglu(8192, 4096, 128)
    yield swiglu(8192, 4096, 256)
    for dim, rank in ((768, 64), (1152, 16), (2048, 32), (4096, 64), (5120, 128), (4096, 5)):
        for tokens in (512, 16384):
            yield swiglu(tokens, dim, rank, slow=True)
            yield swiglu(tokens, dim, rank, experts=2, norm=True, weights=FP32, slow=True)
    for residual in ("input", "norm", "none"):
        yield swiglu(8192, 4096, 32, experts=2, norm=True, residual=residual, slow=True)
    yield swiglu(8192, 4096, 32, experts=2, shared_up=True, slow=True)
    yield swiglu(8192, 4096, 32, dtype=FP16, slow=True)
    yield swiglu(8192, 4096, 64, dtype=FP32, slow=True)
    yield swiglu(8192, 4096, 32, norm=True, needs=(True, False, False, False, False), slow=True)
    yield swiglu(8192, 4096, 32, needs=(False, True, True, True, False), slow=True)


# cp_linear


def cp(
    tokens: int,
    dim: int,
    rank: int,
    *,
    dim_out: int | None = None,
    count: int = 1,
    dense: bool = False,
    dropout: float = 0.0,
    dropout_at: str = "after",
    bias: bool = False,
    dtype: torch.dtype = BF16,
    weights: torch.dtype | None = None,
    slow: bool = False,
) -> Problem:
    wide, out = weights or dtype, dim_out or dim

    def call() -> None:
        module = backend("cp_linear")
        x = meta(tokens, dim, dtype=dtype)
        frozen = [meta(out, dim, dtype=dtype) for _ in range(count)]
        biases = [meta(out, dtype=dtype) if bias else None for _ in range(count)]
        factors = meta(rank, dim, dtype=wide), meta(out, rank, dtype=wide)
        modes = [meta(*(rank,) * (2 if dense else 1), dtype=wide) for _ in range(count)]
        seeds = meta(count, dtype=torch.int64) if dropout else None
        operands = (x, frozen, biases, *factors, modes)
        settings = (seeds, 1.0, dropout, dropout_at)
        _, z = module.forward(*operands, *settings)
        dys = [meta(tokens, out, dtype=dtype) for _ in range(count)]
        module.backward(dys, *operands, z, *settings, (True,) * 3, (True,) * count, (bias,) * count)

    flags = [
        f"{tokens}x{dim}x{rank}",
        short(dtype) if wide is dtype else f"{short(dtype)}/{short(wide)}",
        f"to {out}" if out != dim else "",
        f"group of {count}" if count > 1 else "",
        "dense" if dense else "",
        f"dropout {dropout_at}" if dropout else "",
        "bias" if bias else "",
    ]
    return Problem("cp_linear", " ".join(f for f in flags if f), call, slow)


def cp_linear() -> Iterator[Problem]:
    yield cp(8192, 4096, 64)
    yield cp(16384, 768, 64, count=3, weights=FP32)
    for dim, rank in ((768, 64), (1152, 16), (4096, 8), (4096, 128)):
        for dense in (False, True):
            yield cp(8192, dim, rank, dense=dense, weights=FP32, slow=True)
    yield cp(8192, 4096, 64, dropout=0.1, slow=True)
    yield cp(8192, 4096, 64, dropout=0.1, dropout_at="before", dense=True, bias=True, slow=True)
    yield cp(8192, 4096, 64, dtype=FP16, slow=True)
    yield cp(8192, 4096, 64, dtype=FP32, slow=True)


# modality_gate, projected_modality_gate


def gate(
    tokens: int,
    heads: int,
    width: int,
    *,
    per_token: bool = False,
    dtype: torch.dtype = BF16,
    weights: torch.dtype | None = None,
    slow: bool = False,
) -> Problem:
    wide = weights or dtype

    def call() -> None:
        module = backend("modality_gate")
        logits = meta(*((tokens, heads) if per_token else (heads,)), dtype=wide)
        value = meta(tokens, heads, width, dtype=dtype)
        operands = (value, logits, meta(tokens, dtype=torch.bool))
        module.forward(*operands)
        module.backward(torch.empty_like(value), *operands, (True, True))

    kind = " per token" if per_token else ""
    label = f"{tokens}x{heads}x{width} {short(dtype)}/{short(wide)}{kind}"
    return Problem("modality_gate", label, call, slow)


def projected(
    tokens: int,
    heads: int,
    width: int,
    dim: int,
    *,
    dtype: torch.dtype = BF16,
    weights: torch.dtype | None = None,
    slow: bool = False,
) -> Problem:
    wide = weights or dtype

    def call() -> None:
        module = backend("projected_modality_gate")
        value, hidden = meta(tokens, heads, width, dtype=dtype), meta(tokens, dim, dtype=dtype)
        mask = meta(tokens, dtype=torch.bool)
        operands = (value, hidden, meta(heads, dim, dtype=wide), mask)
        _, tanh = module.forward(*operands)
        module.backward(torch.empty_like(value), *operands, tanh, (True,) * 3)

    label = f"{tokens}x{heads}x{width} D={dim} {short(dtype)}/{short(wide)}"
    return Problem("projected_modality_gate", label, call, slow)


def gates() -> Iterator[Problem]:
    yield gate(8192, 32, 128)
    yield gate(8192, 32, 128, per_token=True, weights=FP32)
    yield projected(8192, 32, 128, 4096)
    yield projected(8192, 32, 128, 4096, weights=FP32)
    for dtype in (FP16, FP32):
        yield gate(8192, 32, 128, dtype=dtype, slow=True)
        yield projected(8192, 32, 128, 4096, dtype=dtype, slow=True)
    for heads, width, dim in ((12, 64, 768), (8, 128, 4096), (3, 80, 1000)):
        yield gate(2048, heads, width, slow=True)
        yield projected(2048, heads, width, dim, slow=True)


# what the shipped tables hold

_DTYPES = {"bfloat16": BF16, "float16": FP16, "float32": FP32}


def _swiglu_entry(
    dtype: torch.dtype, tokens: int, dim: int, rank: int, experts: int
) -> list[Problem]:
    size = {"experts": experts, "dtype": dtype, "slow": True}
    if experts == 1:
        normed = swiglu(tokens, dim, rank, norm=True, residual="norm", **size)
        return [swiglu(tokens, dim, rank, **size), normed]
    return [swiglu(tokens, dim, rank, norm=True, residual="norm", weights=FP32, **size)]


def _cp_entry(dtype: torch.dtype, T: int, R: int, K: int = 1, **widths: int) -> list[Problem]:
    dim = widths.get("d_in", widths.get("d", 0))
    return [cp(T, dim, R, dim_out=widths.get("d_out"), count=K, dtype=dtype)]


def _gate_entry(dtype: torch.dtype, heads: int, size: int = 128, **widths: int) -> list[Problem]:
    dim = next(iter(widths.values()), heads * size)
    return [gate(4096, heads, size, dtype=dtype), projected(4096, heads, size, dim, dtype=dtype)]


FROM_DIMS: dict[str, Callable[..., list[Problem]]] = {
    "swiglu_adapter": _swiglu_entry,
    "cp_linear": _cp_entry,
    "modality_gate": _gate_entry,
    "projected_modality_gate": _gate_entry,
}
"""Per contract: problems that use the entry measured for these `dims`."""


def shipped(architecture: str = "sm_90") -> Iterator[Problem]:
    """Each entry's `kernel` begins with the contract's name."""
    from mmadapt.ops._backends.triton._configs import entries

    seen = set()
    for entry in entries(architecture):
        contract = next(c for c in FROM_DIMS if entry["kernel"].startswith(c))
        for problem in FROM_DIMS[contract](_DTYPES[entry["dtype"]], **entry["dims"]):
            if problem.name not in seen:
                seen.add(problem.name)
                yield dataclasses.replace(problem, label=f"{problem.label} (table)", shipped=True)


# known good and bad


def toys() -> Iterator[Problem]:
    """Products with accumulators that fit, that do not, and tiles beyond shared memory."""

    def call(*tiles: int) -> Callable[[], None]:
        def run() -> None:
            spec = importlib.util.spec_from_file_location("sm90_toy", HERE / "sm90_toy.py")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            module.product(meta(256, 2048), meta(2048, 256), meta(256, 256, dtype=FP32), *tiles)

        return run

    yield Problem("toy", "clean", call(64, 64, 64, 3))
    yield Problem("toy", "spills", call(128, 256, 32, 2))
    yield Problem("toy", "large", call(64, 64, 512, 3))
