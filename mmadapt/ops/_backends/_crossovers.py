"""Where a backend that could serve a call is not worth choosing: measured crossovers.

`crossovers.json` holds entries by contract, backend and dtype. An entry may be limited to a range
of `dim` (features of `x`, or of a token's values for the gates), of `rank` (of the adapter or the
factors) and of `experts`, both ends included, by `norm` to adapters behind a fused norm or without,
and by `dense` to factored linears with a mode matrix among their modes or without; the first that
fits a call counts. Its `min_tokens`: the least number of tokens from which the backend was never
slower than those it would be preferred to, null where there was none. `record` names the
measurement (default: the file's own). GPUs without measurements of their own use those of the
H200, but for "cuda".

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
"""Backends that are chosen only where an entry of the file says so, and on Hopper GPUs alone: what
serves older ones are other kernels, which nobody has measured there."""

ANY = (0, 2**63)


@dataclass(frozen=True)
class Entry:
    min_tokens: int | None
    record: str
    dim: tuple[int, int] = ANY
    rank: tuple[int, int] = ANY
    experts: tuple[int, int] = ANY
    norm: bool | None = None
    dense: bool | None = None

    def fits(self, call: "Extent") -> bool:
        return (
            self.dim[0] <= call.dim <= self.dim[1]
            and self.rank[0] <= call.rank <= self.rank[1]
            and self.experts[0] <= call.experts <= self.experts[1]
            and self.norm in (None, call.norm)
            and self.dense in (None, call.dense)
        )


class Extent(NamedTuple):
    """What an entry asks of a call. A gate has rank 0."""

    dim: int
    rank: int
    experts: int = 1
    norm: bool = False
    dense: bool = False

    def __str__(self) -> str:
        parts = [f"dim {self.dim}", f"rank {self.rank}" if self.rank else ""]
        parts.append(f"{self.experts} experts" if self.experts > 1 else "")
        parts.append("behind a norm" if self.norm else "")
        parts.append("mode matrices" if self.dense else "")
        return ", ".join(part for part in parts if part)


def parse(table: dict[str, Any]) -> dict[tuple[str, str, str], tuple[Entry, ...]]:
    """The entries of a file in its order, by contract, backend and dtype as `str(torch.dtype)`."""
    found: dict[tuple[str, str, str], tuple[Entry, ...]] = {}
    for entry in table["entries"]:
        key = (entry["op"], entry["backend"], f"torch.{entry['dtype']}")
        limits = {n: tuple(entry[n]) for n in ("dim", "rank", "experts") if n in entry}
        limits |= {n: entry[n] for n in ("norm", "dense") if n in entry}
        parsed = Entry(entry["min_tokens"], entry.get("record", table["record"]), **limits)
        found[key] = (*found.get(key, ()), parsed)
    return found


@functools.cache
def measured() -> dict[tuple[str, str, str], tuple[Entry, ...]]:
    """`parse` of the shipped file."""
    path = Path(__file__).with_name("crossovers.json")
    return parse(json.loads(path.read_text(encoding="utf-8")))


def extent(op: str, args: tuple[Any, ...]) -> Extent:
    match op:
        case "swiglu_adapter":  # x, gate [E, m, d], down, up, expert, norm_weight
            experts, rank, dim = args[1].shape
            return Extent(dim, rank, experts, args[5] is not None)
        case "cp_linear":  # x, weights, biases, factor_in [R, d], factor_out, modes [R] or [R, R]
            dense = any(mode.ndim == 2 for mode in args[5])
            return Extent(args[0].shape[1], args[3].shape[0], dense=dense)
        case _:  # value [T, H, h]
            return Extent(args[0].shape[1] * args[0].shape[2], 0)


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


def not_worth_it(op: str, backend: str, tokens: int, args: tuple[object, ...]) -> str | None:
    """Why an automatic choice passes over `backend` for this call, or None. `args[0]`: a tensor."""
    first = args[0]
    least: int | None = MIN_TOKENS.get((op, backend), 0)
    if isinstance(first, Tensor):
        if backend == "triton" and first.device.type == "cpu":
            return "on CPU tensors it runs in Triton's interpreter, for tests only"
        if backend in MEASURED_ONLY and first.is_cuda and not _is_hopper(first.device):
            return "its kernels were measured on Hopper GPUs only"
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
