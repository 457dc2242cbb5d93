"""Where a backend that could serve a call is not worth choosing: measured crossovers.

`crossovers.json` holds entries by contract, backend and dtype. An entry may be limited to a range
of `dim` (features of `x`, or of a token's values for the gates) and of `rank` (of the adapter or
the factors), both ends included; the first that fits a call counts. Its `min_tokens`: the least
number of tokens from which the backend was never slower than those it would be preferred to, null
where there was none. `record` names the measurement (default: the file's own). GPUs without
measurements of their own use those of the H200.

Without an entry that fits, a backend is chosen whatever the size; but not "cuda", which stands
before Triton only where a measurement says so.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

MIN_TOKENS: dict[tuple[str, str], int] = {("swiglu_adapter", "cpu"): 1}
"""For backends that are not in the file; the C++ one's is a guess."""

MEASURED_ONLY = {"cuda"}
"""Backends that are chosen only where an entry of the file says so."""

ANY = (0, 2**63)


@dataclass(frozen=True)
class Entry:
    min_tokens: int | None
    record: str
    dim: tuple[int, int] = ANY
    rank: tuple[int, int] = ANY

    def fits(self, dim: int, rank: int) -> bool:
        return self.dim[0] <= dim <= self.dim[1] and self.rank[0] <= rank <= self.rank[1]


def parse(table: dict[str, Any]) -> dict[tuple[str, str, str], tuple[Entry, ...]]:
    """The entries of a file in its order, by contract, backend and dtype as `str(torch.dtype)`."""
    found: dict[tuple[str, str, str], tuple[Entry, ...]] = {}
    for entry in table["entries"]:
        key = (entry["op"], entry["backend"], f"torch.{entry['dtype']}")
        ranges = {name: tuple(entry[name]) for name in ("dim", "rank") if name in entry}
        parsed = Entry(entry["min_tokens"], entry.get("record", table["record"]), **ranges)
        found[key] = (*found.get(key, ()), parsed)
    return found


@functools.cache
def measured() -> dict[tuple[str, str, str], tuple[Entry, ...]]:
    """`parse` of the shipped file."""
    path = Path(__file__).with_name("crossovers.json")
    return parse(json.loads(path.read_text(encoding="utf-8")))


def extent(op: str, args: tuple[Any, ...]) -> tuple[int, int]:
    """`dim` and `rank` of a call; a gate has rank 0."""
    match op:
        case "swiglu_adapter":  # x, gate [E, m, d]
            return args[0].shape[1], args[1].shape[1]
        case "cp_linear":  # x, weights, biases, factor_in [R, d]
            return args[0].shape[1], args[3].shape[0]
        case _:  # value [T, H, h]
            return args[0].shape[1] * args[0].shape[2], 0


def not_worth_it(op: str, backend: str, tokens: int, args: tuple[object, ...]) -> str | None:
    """Why an automatic choice passes over `backend` for this call, or None. `args[0]`: a tensor."""
    first = args[0]
    least: int | None = MIN_TOKENS.get((op, backend), 0)
    if isinstance(first, Tensor):
        if backend == "triton" and first.device.type == "cpu":
            return "on CPU tensors it runs in Triton's interpreter, for tests only"
        entries = measured().get((op, backend, str(first.dtype)), ())
        dim, rank = extent(op, args) if entries or backend in MEASURED_ONLY else (0, 0)
        entry = next((e for e in entries if e.fits(dim, rank)), None)
        if entry is not None:
            least = entry.min_tokens
            if least is None:
                other = "another backend" if backend in MEASURED_ONLY else "the reference backend"
                return f"in {first.dtype} {other} was faster at some measured size ({entry.record})"
        elif backend in MEASURED_ONLY:
            size = f"dim {dim}, rank {rank}" if rank else f"dim {dim}"
            return f"no measurement says that it pays for {first.dtype}, {size}"
    if tokens < least:
        return f"{tokens} tokens are below its crossover of {least}"
    return None
