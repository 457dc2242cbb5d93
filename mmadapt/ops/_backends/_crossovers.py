"""Where a backend that could serve a call is not worth choosing: measured crossovers.

`crossovers.json` holds entries by contract, backend and dtype. An entry may be limited to some
calls (`Extent`): to ranges, both ends included, of `dim` (features of `x`, or of a token's
values for the gates), `dim_out` (of a factored linear), `rank` (of the adapter or the factors) and
`experts`; and by `norm` (fused or not), `dense` (a mode matrix among the modes or none) and `wide`
(trained weights in fp32 beside 16-bit activations or not). The first that fits a call counts. Its
`min_tokens`: the least number of tokens from which the backend was never slower than those it would
be preferred to, null where there was none. `record` names the measurement (default: the file's
own). GPUs without measurements of their own use those of the H200; with "cuda" those of its compute
capability alone.

Without an entry that fits, a backend is chosen whatever the size; but not "cuda", which stands
before Triton only where a measurement says so.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

MIN_TOKENS: dict[tuple[str, str], int] = {("swiglu_adapter", "cpu"): 1}
"""For backends that are not in the file; the C++ one's is a guess."""

MEASURED_ONLY = {"cuda"}
"""Backends that are chosen only where an entry of the file says so, and only with the kernels that
were measured: others serve older GPUs."""


class Extent(NamedTuple):
    """What an entry may ask of a call. A gate has rank 0, and only cp_linear a dim_out."""

    dim: int
    rank: int
    dim_out: int = 0
    experts: int = 1
    norm: bool = False
    dense: bool = False
    wide: bool = False

    def __str__(self) -> str:
        parts = [f"dim {self.dim}"]
        parts += [f"dim_out {self.dim_out}"] if self.dim_out else []
        parts += [f"rank {self.rank}"] if self.rank else []
        parts += [f"{self.experts} experts"] if self.experts > 1 else []
        parts += ["behind a norm"] if self.norm else []
        parts += ["mode matrices"] if self.dense else []
        parts += ["fp32 weights"] if self.wide else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Entry:
    min_tokens: int | None
    record: str
    limits: tuple[tuple[str, Any], ...] = ()
    """Names of `Extent`'s fields with a range of numbers or a truth value."""

    def fits(self, call: Extent) -> bool:
        for name, limit in self.limits:
            value = getattr(call, name)
            if not (value is limit if isinstance(limit, bool) else limit[0] <= value <= limit[1]):
                return False
        return True


def parse(table: dict[str, Any]) -> dict[tuple[str, str, str], tuple[Entry, ...]]:
    """The entries of a file in its order, by contract, backend and dtype as `str(torch.dtype)`."""
    found: dict[tuple[str, str, str], tuple[Entry, ...]] = {}
    for entry in table["entries"]:
        key = (entry["op"], entry["backend"], f"torch.{entry['dtype']}")
        limits = tuple((name, entry[name]) for name in Extent._fields if name in entry)
        parsed = Entry(entry["min_tokens"], entry.get("record", table["record"]), limits)
        found[key] = (*found.get(key, ()), parsed)
    return found


@functools.cache
def measured() -> dict[tuple[str, str, str], tuple[Entry, ...]]:
    """`parse` of the shipped file."""
    path = Path(__file__).with_name("crossovers.json")
    return parse(json.loads(path.read_text(encoding="utf-8")))


def extent(op: str, args: tuple[Any, ...]) -> Extent:
    first = args[0]
    match op:
        case "swiglu_adapter":  # x, gate [E, m, d], down, up, expert, norm_weight
            experts, rank, dim = args[1].shape
            wide = args[1].dtype != first.dtype
            return Extent(dim, rank, experts=experts, norm=args[5] is not None, wide=wide)
        case "cp_linear":  # x, weights, biases, factor_in [R, d], factor_out [d_out, R], modes
            _, _, _, factor_in, factor_out, modes = args
            dense = any(mode.ndim == 2 for mode in modes)
            wide = factor_in.dtype != first.dtype
            rank, dim = factor_in.shape
            return Extent(dim, rank, factor_out.shape[0], dense=dense, wide=wide)
        case _:  # value [T, H, h]
            return Extent(first.shape[1] * first.shape[2], 0)


@functools.cache
def _not_as_measured(device: torch.device) -> str | None:
    """Why the kernels that were measured, those for sm_90a, do not serve this GPU, or None."""
    from mmadapt.ops._backends.cuda._launch import unsupported_gpu  # loaded with its backends

    return unsupported_gpu(device.index, hopper=True)


def not_worth_it(op: str, backend: str, tokens: int, args: tuple[object, ...]) -> str | None:
    """Why an automatic choice passes over `backend` for this call, or None. `args[0]`: a tensor."""
    first = args[0]
    least: int | None = MIN_TOKENS.get((op, backend), 0)
    if isinstance(first, Tensor):
        if backend == "triton" and first.device.type == "cpu":
            return "on CPU tensors it runs in Triton's interpreter, for tests only"
        if backend in MEASURED_ONLY and first.is_cuda:
            reason = _not_as_measured(first.device)
            if reason is not None:
                return f"only its kernels for sm_90a were measured: {reason}"
        entries = measured().get((op, backend, str(first.dtype)), ())
        call = extent(op, args) if entries or backend in MEASURED_ONLY else Extent(0, 0)
        entry = next((e for e in entries if e.fits(call)), None)
        if entry is not None:
            least = entry.min_tokens
            if least is None:
                other = "another backend" if backend in MEASURED_ONLY else "the reference backend"
                return f"in {first.dtype} {other} was faster at some measured size ({entry.record})"
        elif backend in MEASURED_ONLY:
            return f"no measurement says that it pays for {first.dtype}, {call}"
    if tokens < least:
        return f"{tokens} tokens are below its crossover of {least}"
    return None
