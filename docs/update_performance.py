"""Write docs/performance.md and its pictures from the committed records.

    python docs/update_performance.py [--check] [--records FOLDER]

Everything on that page comes from the GPU records in bench/results: the newest measurement of each
thing, with the record it stands in. `--check` changes nothing and fails when the page is not what
the records say (pictures are not compared).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import records  # noqa: E402
from bench.case import BOTH  # noqa: E402
from bench.records import Comparison, Group, Run  # noqa: E402

RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "performance.md"
PICTURES = ROOT / "docs" / "performance"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--records", type=Path, default=RESULTS)
    chosen = parser.parse_args(arguments)
    found = records.on_gpu(records.runs(sorted(chosen.records.glob("*.jsonl"))))
    if chosen.check:
        same = PAGE.exists() and PAGE.read_text(encoding="utf-8") == page(found, pictures())
        if not same:
            print("docs/performance.md differs; run python docs/update_performance.py")
        return int(not same)
    from bench import plot

    for old in PICTURES.glob("*.png"):
        old.unlink()
    if found:
        plot.draw(found, PICTURES)
    PAGE.write_text(page(found, pictures()), encoding="utf-8")
    return 0


def pictures() -> list[Path]:
    return sorted(PICTURES.glob("*.png"))


def page(found: list[Run], drawn: Sequence[Path]) -> str:
    """The whole page."""
    parts = [
        "# Performance",
        "Written by `python docs/update_performance.py` from the records in `bench/results`; not by"
        " hand.",
        *measured(found),
        *goals(found),
        *comparisons(found),
        *blocks(found),
        *steps(found),
        *overhead(found),
        *growth(found),
        *fsdp(found),
        *gallery(drawn),
        *reproduce(),
    ]
    return "\n\n".join(parts) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)


def link(path: Path) -> str:
    return f"[{path.stem}](../bench/results/{path.name})"


def measured(found: list[Run]) -> list[str]:
    if not found:
        return ["## What was measured", "No GPU has been measured yet."]
    rows = []
    for path in dict.fromkeys(run.path for run in found):
        mine = [run for run in found if run.path == path]
        machine = mine[-1].machine
        bytes_, flops = (
            sorted(run.machine["ceilings"][name] for run in mine)
            for name in ("bytes_per_s", "flops_per_s")
        )
        rows.append(
            [
                link(path),
                machine["gpu"],
                machine["torch"],
                str(machine["triton"]),
                machine["commit"] + (" (changed)" if machine["dirty"] else ""),
                f"{_range(bytes_, 1e-12, 2)} TB/s",
                f"{_range(flops, 1e-12, 0)} TFLOP/s",
            ]
        )
    head = ["record", "GPU", "torch", "triton", "commit", "copy reached", "8192³ bf16 product"]
    return [
        "## What was measured",
        table(head, rows),
        "Every time stands beside others of the same run on the same GPU, taken in turn round by "
        "round; ratios are medians over rounds. A result is timed only if its error against fp64 "
        "is at most twice eager torch's plus a rounding unit, for the output and every gradient. "
        "`graph-cold`: a CUDA graph over inputs that are not in the cache. `eager-call`: the "
        "host's clock around plain calls. The floor is the larger of algorithmic bytes at the "
        "measured copy rate and operations at the measured product's rate.",
    ]


def _range(values: list[float], scale: float, digits: int) -> str:
    low, high = (f"{v * scale:.{digits}f}" for v in (values[0], values[-1]))
    return low if low == high else f"{low} to {high}"


def goals(found: list[Run]) -> list[str]:
    groups = records.goals(found)
    rows = []
    for group in groups:
        goal = group.rows[-1]
        sign = "at least" if goal["at_least"] else "at most"
        bound = f"{sign} {goal['bound']:g} {goal['unit']}"
        what = goal["goal"] + ("" if goal["mode"] == "graph-cold" else f" ({goal['mode']})")
        if goal["measured"] is None:
            cells = ["-", bound, f"not measured: {(goal['why'] or '')[:80]}"]
        else:
            cells = [f"{goal['measured']:.2f} {goal['unit']}", bound, missed(goal)]
        rows.append([goal["suite"], goal["case"], what, *cells, link(group.run.path)])
    if not rows:
        return ["## Goals", "Not measured yet."]
    met = sum(row[5].startswith("met") for row in rows)
    head = ["suite", "case", "what", "measured", "goal", "verdict", "record"]
    return ["## Goals", f"{met} of {len(rows)} met.", table(head, rows)]


def missed(goal: dict) -> str:
    """Met, or by how many per cent of the bound it is missed."""
    if goal["met"]:
        return "met"
    off = goal["measured"] / goal["bound"] - 1
    return f"missed by {100 * abs(off):.0f} %"


def comparisons(found: list[Run]) -> list[str]:
    compared = [c for g in records.cases(found) if (c := records.compare(g)) is not None]
    compared.sort(key=lambda c: c.ratio)
    parts = ["## Where we win, where we lose"]
    if not compared:
        return [*parts, "Nothing was measured against others yet."]
    counts = {v: sum(c.verdict == v for c in compared) for v in ("win", "loss", "equal")}
    parts.append(
        f"Our fastest form against the fastest of all others that compute the same, "
        f"{len(compared)} cases and passes: faster in {counts['win']}, slower in "
        f"{counts['loss']}, not to be told apart in {counts['equal']} (within what equal code "
        "differed by)."
    )
    for verdict, title in (
        ("loss", "### Slower"),
        ("equal", "### Not to be told apart"),
        ("win", "### Faster"),
    ):
        rows = [_comparison(c) for c in compared if c.verdict == verdict]
        if rows:
            head = [
                "case",
                "pass",
                "mode",
                "ours",
                "fastest other",
                "our time over theirs",
                "of floor",
            ]
            parts += [title, table(head, rows[::-1] if verdict == "loss" else rows)]
    return parts


def _comparison(c: Comparison) -> list[str]:
    row = c.group.by()[c.ours]
    return [
        f"{c.group['suite']} {c.group['case']}",
        c.group["pass"],
        c.group["mode"],
        f"{c.ours}, {1e3 * row['ms']['p50']:.1f} us",
        f"{c.theirs}, {1e3 * c.group.by()[c.theirs]['ms']['p50']:.1f} us",
        f"{c.ratio:.2f} (± {c.spread:.3f})",
        f"{row['ms']['p50'] / row['limit_ms']:.2f} x",
    ]


def blocks(found: list[Run]) -> list[str]:
    groups = [g for g in records.cases(found) if "batch" in g["shape"]]
    parts = ["## Whole layers"]
    if not groups:
        return [*parts, "Not measured yet."]
    for group in groups:
        rows = [
            [
                name,
                f"{row['ms']['p50']:.3f}",
                _ratio(row, "frozen"),
                _ratio(row, "frozen-compile"),
                _gigabytes(row.get("peak_bytes")),
                "-" if row.get("saved_bytes") is None else f"{row['saved_bytes'] / 1e6:.0f}",
            ]
            for name, row in group.by().items()
            if "ms" in row and not records.is_again(name)
        ]
        lost = [f"{n}: {_why(row)}" for n, row in group.by().items() if "ms" not in row]
        spread = _spread(group)
        head = [
            "form", "ms", "over the frozen layer", "over it compiled", "peak GB above weights",
            "kept for backward, MB",
        ]  # fmt: skip
        title = f"### {group['suite']} {group['case']}, {group['pass']}, {group['mode']}"
        parts += [title, table(head, rows)]
        parts.append("; ".join([*lost, f"{spread}Record: {link(group.run.path)}."]))
    return parts


def _spread(group: Group) -> str:
    """What equal code differed by, as a sentence."""
    found = [r["aa_spread"] for r in group.rows if r.get("aa_spread") is not None]
    return f"Equal code differed by {100 * max(found):.1f} %. " if found else ""


def _why(row: dict) -> str:
    return (row.get("failed") or row.get("skipped") or "no time").replace("\n", " ")[:160]


def _ratio(row: dict, base: str) -> str:
    return f"{row['ratio'][base]['p50']:.3f}" if base in row["ratio"] else "-"


def _gigabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e9:.2f}"


def steps(found: list[Run]) -> list[str]:
    groups = records.newest(found, "step", records.step_key).values()
    parts = ["## A whole training step"]
    if not groups:
        return [*parts, "Not measured yet."]
    for group in groups:
        rows = [
            [
                row["method"],
                f"{row['tokens_per_s']:,.0f}",
                _ratio(row, "frozen"),
                _ratio(row, "lora"),
                _gigabytes(row["peak_bytes"]),
                f"{row['trained']:,}",
            ]
            for row in group.rows
            if "seconds" in row and not records.is_again(row["method"])
        ]
        spread = _spread(group)
        lost = [f"{row['method']}: {_why(row)}" for row in group.rows if "seconds" not in row]
        how = "with" if group["checkpointing"] else "without"
        head = [
            "method",
            "tokens/s",
            "time over frozen",
            "time over PEFT's LoRA",
            "peak GB",
            "trained",
        ]
        parts += [
            f"### {group['geometry']}, {group['layers']} layers, {group['batch']} x "
            f"{group['length']} tokens, {how} activation checkpointing",
            table(head, rows),
            "; ".join([*lost, f"{spread}Record: {link(group.run.path)}."]),
        ]
    parts.append(
        "`frozen` trains the visual projection alone: what forward and backward of the bare model "
        "cost. `lora` is PEFT's LoRA on all linears at the rank that comes nearest to PILL's "
        "number of parameters, `lora-manual` the same with hand-written autograd in the manner of "
        "Unsloth without its kernels for norms, RoPE and the loss, `pill-eager` PILL's released "
        "equations, `pill` mmadapt's tuner. Peak: weights, optimizer state and the step itself."
    )
    return parts


def overhead(found: list[Run]) -> list[str]:
    groups = records.newest(found, "overhead", records.overhead_key).values()
    parts = ["## What a call costs the host"]
    if not groups:
        return [*parts, "Not measured yet."]
    rows = []
    for group in groups:
        times = {row["level"]: row for row in group.rows if "us" in row}
        cells = [
            f"{times[level]['us']['p50']:.0f}" if level in times else "-"
            for level in ("eager", "op", "module", "compiled")
        ]
        rows.append([group["contract"], str(group["tokens"]), group["pass"], *cells])
    head = ["contract", "tokens", "pass", "eager", "op", "module", "compiled"]
    paths = dict.fromkeys(group.run.path for group in groups)
    return [
        *parts,
        "Microseconds until a call returns, the device idle.",
        table(head, rows),
        f"Record: {', '.join(link(path) for path in paths)}.",
    ]


def growth(found: list[Run]) -> list[str]:
    groups = records.newest(found, "fit", lambda row: (row["over"],)).values()
    parts = ["## Growth with tokens and layers"]
    if not groups:
        return [*parts, "Not measured yet."]
    rows = []
    for group in groups:
        for row in group.rows:
            one = {"tokens": "token", "layers": "layer"}[row["over"]]
            unit, scale = ("ns", 1e6) if row["unit"] == "ms" else (row["unit"], 1.0)
            reach = row["slope"] * row["range"][1]
            start = row["intercept"] if abs(row["intercept"]) > 1e-9 * abs(reach) else 0.0
            rows.append(
                [
                    row["provider"],
                    {"ms": "time"}.get(row["quantity"], row["quantity"].removesuffix("_bytes")),
                    f"{row['slope'] * scale:,.4g} {unit} a {one}",
                    f"{start * scale:,.4g} {unit}",
                    f"{100 * row['max_deviation']:.1f} %",
                    f"{row['range'][0]:,} to {row['range'][1]:,} {row['over']}",
                    link(group.run.path),
                ]
            )
    head = ["provider", "quantity", "slope", "intercept", "largest deviation", "over", "record"]
    return [
        *parts,
        f"Straight lines fitted to {BOTH} of the routed adapter behind its norm.",
        table(head, rows),
        *growth_failures(found),
    ]


def growth_failures(found: list[Run]) -> list[str]:
    """What has no line because it failed."""
    groups = records.newest(found, "growth", records.growth_key).values()
    lines = []
    for row in (row for group in groups for row in group.rows if "failed" in row):
        error, _, _ = row["failed"].partition("\n")
        lines.append(f"- {row['provider']}, {row['value']:,} {row['over']}: {error}")
    return ["Not measured, because it failed:", "\n".join(lines)] if lines else []


def fsdp(found: list[Run]) -> list[str]:
    groups = records.newest(found, "fsdp", lambda r: (r["method"], r["geometry"], r["processes"]))
    parts = ["## FSDP2"]
    if not groups:
        return [*parts, "Not measured on GPUs yet."]
    rows = [_fsdp(group) for group in groups.values()]
    head = [
        "method", "geometry", "processes", "tokens/s, one", "tokens/s, all", "weak scaling",
        "losses apart", "record",
    ]  # fmt: skip
    return [*parts, table(head, rows)]


def _fsdp(group: Group) -> list[str]:
    row = group.rows[-1]
    return [
        row["method"],
        row["geometry"],
        str(row["processes"]),
        f"{row['tokens_per_s']['one']:,.0f}",
        f"{row['tokens_per_s']['many']:,.0f}",
        f"{100 * row['efficiency']:.0f} %",
        f"{row['losses_apart']:.1e}",
        link(group.run.path),
    ]


def gallery(drawn: Sequence[Path]) -> list[str]:
    if not drawn:
        return []
    return ["## Pictures", *(f"![{path.stem}](performance/{path.name})" for path in drawn)]


def reproduce() -> list[str]:
    return [
        "## Reproduce",
        "`make bench-gpu-all` runs everything above on one GPU; `make bench-gpu` the goals alone. "
        "[bench/README.md](../bench/README.md) lists the commands one by one with what each takes. "
        "Then `make performance` writes this page.",
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
