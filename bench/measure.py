"""Runs a case: gate, timing, probes; one row per provider."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench import probes, timing
from bench.case import BACKWARD, FORWARD, KINDS, Case
from bench.gate import Gate
from mmadapt.ops import BackendError

YARDSTICKS = ("copy", "frozen-gemm", "frozen")
"""Timed beside whatever was asked for, because ratios refer to them."""
TWICE = ("cuda", "triton", "mmadapt", "mmadapt-ops")
"""Whose equal code is timed a second time, the first of them that runs, for the A/A spread."""


@dataclass(frozen=True)
class Settings:
    mode: str = timing.GRAPH
    rounds: int = 30
    warmup_seconds: float = 0.2
    providers: Sequence[str] | None = None
    extra: Sequence[str] = ()
    """Optional providers to run beside the others."""
    compile: bool = True
    kinds: Sequence[str] = KINDS
    count_launches: bool = True


def measure(case: Case, machine: dict[str, Any], settings: Settings) -> list[dict[str, Any]]:
    """A row per provider and kind: skipped, failed, or its times, ratios, memory and errors."""
    gate = Gate(case)
    rows = []
    for kind in settings.kinds:
        with _retained(kind):
            rows += _measure_kind(case, kind, gate, machine, settings)
    return rows


@contextlib.contextmanager
def _retained(kind: str) -> Iterator[None]:
    """A backward is run again and again: compiled code must not reuse what it was given."""
    if kind != BACKWARD:
        yield
        return
    from torch._functorch import config

    torch._dynamo.reset()
    with config.patch(donated_buffer=False):
        yield
    torch._dynamo.reset()


def _measure_kind(
    case: Case, kind: str, gate: Gate, machine: dict[str, Any], settings: Settings
) -> list[dict[str, Any]]:
    rows = {name: _row(case, kind, name, settings) for name in _chosen(case, kind, settings)}
    for name, row in rows.items():
        if (reason := case.providers[name].skip) is not None:
            row["skipped"] = reason
        else:
            _attempt(row, "gate", functools.partial(_gate, case, name, kind, gate, row))
    alive = [name for name, row in rows.items() if _fine(row)]
    if not alive:
        return list(rows.values())
    case.rotate(kind, 3 * machine["l2_bytes"])
    timers: dict[str, timing.Timer] = {}
    for name in alive:
        timer = functools.partial(_timer, timers, name, case, kind, settings)
        _attempt(rows[name], "timer", timer)
    twice = next((n for n in (*TWICE, case.eager, *timers) if n in timers), None)
    if twice is not None:
        _timer(timers, f"{twice} again", case, kind, settings, of=twice)
    seconds = timing.interleave(timers, settings.rounds, settings.warmup_seconds) if timers else {}
    counts = timing.what_counts(seconds[f"{twice} again"], seconds[twice]) if twice else None
    if twice is not None:
        rows[f"{twice} again"] = _row(case, kind, f"{twice} again", settings) | {"again": True}
    for name, row in rows.items():
        if name not in seconds:
            continue
        row["slots"], row["calls"] = len(case.slots), timers[name].calls
        row |= times(case, kind, seconds[name], machine["ceilings"])
        row["ratio"] = {
            base: timing.ratios(seconds[name], seconds[base]) for base in seconds if base != name
        }
        row["aa_spread"] = counts
        if "again" not in row:
            probe = functools.partial(_probe, case, name, kind, row, settings)
            _attempt(row, "probes", probe)
    return list(rows.values())


def _chosen(case: Case, kind: str, settings: Settings) -> list[str]:
    return [
        name
        for name, provider in case.providers.items()
        if kind in provider.kinds
        and (settings.compile or not provider.compiled)
        and (
            (settings.providers is None and not provider.optional)
            or name in (*(settings.providers or ()), *settings.extra, *YARDSTICKS)
        )
    ]


def _row(case: Case, kind: str, name: str, settings: Settings) -> dict[str, Any]:
    return {
        "kind": "row",
        "suite": case.suite,
        "case": case.label,
        "shape": dict(case.shape),
        "dtype": str(case.dtype).removeprefix("torch."),
        "pass": kind,
        "mode": settings.mode,
        "provider": name,
        "rotated": [*case.activations, *(["dy"] if kind != FORWARD else [])],
    }


def _fine(row: dict[str, Any]) -> bool:
    return "failed" not in row and "skipped" not in row


def _attempt(row: dict[str, Any], stage: str, action: Callable[[], None]) -> None:
    try:
        action()
    except BackendError as error:  # a constraint of that backend, not a fault
        row["skipped"] = str(error)
    except Exception as error:  # one provider's failure must not cost the others their numbers
        text = f"{type(error).__name__}: {error}".strip()
        row.setdefault("failed", f"{stage}: {text[:600]}")


def _gate(case: Case, name: str, kind: str, gate: Gate, row: dict[str, Any]) -> None:
    begin = time.perf_counter()
    results = case.make(name, kind)(0)
    timing.synchronize()
    row["first_call_s"] = time.perf_counter() - begin  # compiling and tuning included
    if case.providers[name].gated:
        row["errors"] = gate.check(results, kind)
        row["error"] = max(row["errors"].values())


def _timer(
    timers: dict[str, timing.Timer],
    name: str,
    case: Case,
    kind: str,
    settings: Settings,
    of: str | None = None,
) -> None:
    make = timing.GraphTimer if settings.mode == timing.GRAPH else timing.EagerTimer
    timers[name] = make(case.make(of or name, kind), len(case.slots))


def times(
    case: Case, kind: str, seconds: list[float], ceilings: dict[str, float]
) -> dict[str, Any]:
    """Milliseconds, rates against the algorithm's bytes and flops, percent of the binding limit."""
    spread = timing.spread(seconds)
    (moved, flops), middle = case.cost(kind), spread["p50"]
    limit = max(moved / ceilings["bytes_per_s"], flops / ceilings["flops_per_s"])
    return {
        "ms": {p: 1e3 * s for p, s in spread.items()},
        "gb_per_s": moved / middle * 1e-9,
        "tflops": flops / middle * 1e-12,
        "limit_ms": 1e3 * limit,
        "percent_of_limit": 100 * limit / middle,
    }


def _probe(case: Case, name: str, kind: str, row: dict[str, Any], settings: Settings) -> None:
    row |= probes.memory(case, name, kind)
    if settings.count_launches:
        row["launches"] = probes.launches(case.make(name, kind), case.device)


def release() -> None:
    """Between cases: compiled functions and cached memory of the last one."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
