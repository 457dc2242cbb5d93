"""Reading records: runs, and the newest measurement of everything that was measured.

A record is a JSONL file that holds one or several runs, each begun by a row of kind ``run``. A
later measurement of the same thing (same case, pass and mode; same step, sweep, ...) replaces an
earlier one as a whole, so that ratios stay within one run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]

OURS = (
    "cuda", "triton", "cpu", "reference", "mmadapt", "mmadapt-ops", "mmadapt-compile", "pill",
)  # fmt: skip
"""Providers that are mmadapt; `cuda-inplace` and the like count by their first word."""
YARDSTICKS = ("copy", "frozen-gemm", "frozen", "frozen-compile", "peft-lora")
"""What computes something else."""


@dataclass
class Run:
    """One run of a command: where it is recorded, its machine, its rows."""

    path: Path
    machine: Row
    rows: list[Row] = field(default_factory=list)


def runs(paths: Iterable[Path]) -> list[Run]:
    """All runs of the files, oldest first."""
    found: list[Run] = []
    for path in paths:
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            row = json.loads(text)
            if row["kind"] == "run":
                found.append(Run(path, row))
            elif not found or found[-1].path != path:
                raise ValueError(f"{path}, line {number}: a row before the run's own")
            else:
                found[-1].rows.append(row)
    return sorted(found, key=lambda run: run.machine["time"])


def on_gpu(found: Iterable[Run]) -> list[Run]:
    return [run for run in found if run.machine["gpu"]]


@dataclass
class Group:
    """Rows that were measured against each other, and the run they are from."""

    run: Run
    rows: list[Row]

    def __getitem__(self, key: str) -> Any:
        return self.rows[0][key]

    def by(self, key: str = "provider") -> dict[str, Row]:
        return {row[key]: row for row in self.rows}


def case_key(row: Row) -> tuple:
    return row["suite"], row["case"], row["dtype"], row["pass"], row["mode"]


def step_key(row: Row) -> tuple:
    names = ("geometry", "layers", "batch", "length", "rank", "adapter_dtype", "checkpointing")
    return tuple(row[name] for name in names)


def overhead_key(row: Row) -> tuple:
    return row["contract"], row["tokens"], row["pass"], row["dtype"]


def growth_key(row: Row) -> tuple:
    return row["over"], row["dim"], row["rank"], row["dtype"]


def goal_key(row: Row) -> tuple:
    return row["suite"], row["case"], row["goal"], row["mode"]


def newest(found: Iterable[Run], kind: str, key: Callable[[Row], tuple]) -> dict[tuple, Group]:
    """Groups of the rows of one kind by `key`, each from the newest run that has it."""
    groups: dict[tuple, Group] = {}
    for run in found:
        mine: dict[tuple, list[Row]] = {}
        for row in run.rows:
            if row["kind"] == kind:
                mine.setdefault(key(row), []).append(row)
        groups |= {k: Group(run, rows) for k, rows in mine.items()}
    return groups


def cases(found: Iterable[Run]) -> list[Group]:
    """The newest measurement of every case, pass and mode that has a time at all."""
    groups = newest(found, "row", case_key).values()
    return [group for group in groups if any("ms" in row for row in group.rows)]


def goals(found: Iterable[Run]) -> list[Group]:
    """Every goal as it was measured last; one that never was, as it was tried last."""
    tried = newest(found, "goal", goal_key)
    measured = [
        Run(run.path, run.machine, [r for r in run.rows if r.get("measured") is not None])
        for run in found
    ]
    return [*(tried | newest(measured, "goal", goal_key)).values()]


def is_ours(provider: str) -> bool:
    return provider in OURS or provider.endswith("-inplace")


def is_again(provider: str) -> bool:
    return provider.endswith(" again")


@dataclass(frozen=True)
class Comparison:
    """Our fastest against the fastest of the others in one case and pass."""

    group: Group
    ours: str
    theirs: str
    ratio: float
    """Our time over theirs, round by round, at the median."""
    spread: float
    """What equal code differed by."""

    @property
    def verdict(self) -> str:
        if self.ratio < 1 - self.spread:
            return "win"
        return "loss" if self.ratio > 1 + self.spread else "equal"


def compare(group: Group) -> Comparison | None:
    """None where one side has no time. The reference backend is nobody's choice: it is left out."""
    timed = {n: r for n, r in group.by().items() if "ms" in r and not is_again(n)}
    # A compiled form is compared with compiled forms, an eager one with everything.
    ours = [n for n in timed if is_ours(n) and n != "reference"]
    theirs = [n for n in timed if not is_ours(n) and n not in YARDSTICKS]
    if not ours or not theirs:
        return None
    best, other = (min(names, key=lambda n: timed[n]["ms"]["p50"]) for names in (ours, theirs))
    row = timed[best]
    return Comparison(group, best, other, row["ratio"][other]["p50"], row["aa_spread"] or 0.0)
