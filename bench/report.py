"""Records on disk (JSONL, append-only) and the short tables on the terminal."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class Record:
    """One run's file: bench/results/<date>-<gpu>-<commit>.jsonl, one JSON object a line."""

    def __init__(self, folder: Path, machine: dict[str, Any]):
        commit = machine["commit"] + ("-dirty" if machine["dirty"] else "")
        name = f"{datetime.date.today():%Y-%m-%d}-{machine['name']}-{commit}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / name

    def write(self, *rows: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, allow_nan=True) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


HEAD = (
    "provider", "us p50", "p20..p80", "x copy", "x frozen", "GB/s", "TFLOPS", "% limit", "peak MB",
    "saved MB", "launches", "rel err",
)  # fmt: skip


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Rows grouped by case, pass and mode."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = (f"{row['suite']} {row['case']}", row["dtype"], row["pass"], row["mode"])
        groups.setdefault(key, []).append(row)
    parts = []
    for key, members in groups.items():
        spread = next((r["aa_spread"] for r in members if r.get("aa_spread") is not None), None)
        counts = "" if spread is None else f"; differences below {100 * spread:.1f} % say nothing"
        cells = [_cells(row) for row in members]
        shown = [HEAD, *(c for c in cells if len(c) > 2)]
        widths = [max(len(line[i]) for line in shown) for i in range(len(HEAD))]
        widths[0] = max(len(line[0]) for line in (HEAD, *cells))
        lines = [" | ".join(key) + counts]
        for line in [HEAD, *cells]:
            if len(line) == 2:
                lines.append(f"  {line[0].ljust(widths[0])}  {line[1]}")
            else:
                padded = [c.rjust(w) for c, w in zip(line, widths, strict=True)]
                padded[0] = line[0].ljust(widths[0])
                lines.append("  " + "  ".join(padded))
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    if "skipped" in row:
        return (row["provider"], f"skipped ({row['skipped']})")
    if "ms" not in row:
        return (row["provider"], f"FAILED {row.get('failed', 'no time')}".replace("\n", " ")[:300])
    ms = row["ms"]
    problem = "" if "failed" not in row else "!"
    return (
        row["provider"] + problem,
        f"{1e3 * ms['p50']:.1f}",
        f"{1e3 * ms['p20']:.1f}..{1e3 * ms['p80']:.1f}",
        _ratio(row, "copy"),
        _ratio(row, "frozen-gemm", "frozen"),
        f"{row['gb_per_s']:.0f}",
        f"{row['tflops']:.1f}",
        f"{row['percent_of_limit']:.0f}",
        _megabytes(row.get("peak_bytes")),
        _megabytes(row.get("saved_bytes")),
        "-" if row.get("launches") is None else str(row["launches"]),
        "-" if row.get("error") is None else f"{row['error']:.1e}",
    )


def _ratio(row: dict[str, Any], *bases: str) -> str:
    found = next((row["ratio"][b] for b in bases if b in row["ratio"]), None)
    return "-" if found is None else f"{found['p50']:.2f}"


def _megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:.1f}"
