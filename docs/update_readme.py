"""Fill in the README's numbers from committed records: `python docs/update_readme.py [--check]`.

Between `<!-- demo:begin -->` and `<!-- demo:end -->` goes the demo's result (docs/demo), between
the `bench` marks the newest CPU record of bench/results, between the `gpu` marks the newest
measurement of every goal in the GPU records there. `--check` changes nothing and fails when the
README is not what the records say.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"


def main(arguments: list[str]) -> int:
    text = README.read_text(encoding="utf-8")
    tables = {"demo": demo_table(), "bench": bench_table(), "gpu": gpu_table()}
    filled = text
    for name, content in tables.items():
        filled = fill(filled, name, content)
    if "--check" in arguments:
        if filled != text:
            print("README.md differs from the records; run python docs/update_readme.py")
        return int(filled != text)
    README.write_text(filled, encoding="utf-8")
    return 0


def fill(text: str, name: str, content: str) -> str:
    """`text` with everything between the marks of `name` replaced by `content`."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise SystemExit(f"expected the marks {begin} and {end} exactly once")
    return pattern.sub(lambda _: f"{begin}\n{content}\n{end}", text)


def demo_table() -> str:
    """Accuracy of every evaluated system, visual, text-only and by kind of question."""
    results = json.loads((ROOT / "docs" / "demo" / "metrics.json").read_text(encoding="utf-8"))
    rows = results["rows"]
    skills = list(rows[0]["by_skill"])
    head = ["held-out accuracy (%)", "visual questions", "text only", *skills]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        cells = [row["visual"], row["text_only"], *(row["by_skill"].get(s) for s in skills)]
        lines.append(f"| {row['name']} | {' | '.join(map(_percent, cells))} |")
    before, after = (results["forgetting"][when]["accuracy"] for when in ("before", "after"))
    lines += [
        "",
        f"Text-only accuracy before tuning {_percent(before)} %, after {_percent(after)} %. "
        f"Record: [docs/demo/metrics.json](docs/demo/metrics.json).",
    ]
    return "\n".join(lines)


def _percent(accuracy: dict[str, Any] | None) -> str:
    if accuracy is None or not accuracy["total"]:
        return "-"
    return f"{100 * accuracy['correct'] / accuracy['total']:.1f}"


def bench_table() -> str:
    """Eager time over each provider's, interleaved round by round, in the newest CPU record."""
    records = {
        path: json.loads(path.read_text(encoding="utf-8"))
        for path in (ROOT / "bench" / "results").glob("*-cpu-*.json")
    }
    record, run = max(records.items(), key=lambda item: item[1]["datetime"])
    ratios = {
        bench["param"]: bench["extra_info"]["speedup_over_eager"]
        for bench in run["benchmarks"]
        if "speedup_over_eager" in bench["extra_info"]
    }
    providers = list(next(iter(ratios.values())))
    lines = [
        f"| SwiGLU adapter, eager time over | {' | '.join(providers)} |",
        f"|{'---|' * (len(providers) + 1)}",
    ]
    for kind, row in ratios.items():
        cells = [f"{r['p50']:.2f} ({r['p25']:.2f} to {r['p75']:.2f})" for r in row.values()]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    group = next(b["group"] for b in run["benchmarks"] if "Problem(" in (b["group"] or ""))
    shape = group.split("Problem(")[1].rstrip(")").replace("torch.", "")
    lines += [
        "",
        f"Median (quartiles) over rounds, two threads, {shape}; `cpu` is the C++ kernel, "
        "`reference` the formula as an operator, `eager again` what equal code measures. "
        f"Record: [{record.name}]({record.relative_to(ROOT)}).",
    ]
    return "\n".join(lines)


GRAPH = "graph-cold"
NO_GPU_RECORD = "No GPU has been measured for this table yet."
CUDA = "CUDA: "
"""Before the text of a goal for the CUDA backend, which stands beside that for Triton."""
GPU_HEAD = [
    "operator", "case", "what", "Triton; blocks: as chosen", "goal", "met",
    "CUDA C++", "goal", "met",
]  # fmt: skip


def gpu_table(folder: Path = ROOT / "bench" / "results") -> str:
    """Every goal as it was last measured on a GPU, with its verdict; both backends in a row."""
    runs = [run for path in folder.glob("*.jsonl") for run in _goal_runs(path)]
    if not runs:
        return NO_GPU_RECORD
    found: dict[tuple[str, ...], tuple[Path, dict[str, Any], dict[str, Any]]] = {}
    for path, machine, goals in sorted(runs, key=lambda run: run[1]["time"]):
        for goal in goals:
            key = (goal["suite"], goal["case"], goal["goal"], goal.get("mode", GRAPH))
            if goal["measured"] is not None or key not in found:
                found[key] = (path, machine, goal)
    rows: dict[tuple[str, ...], dict[bool, list[str]]] = {}
    for (suite, case, what, mode), (_, _, goal) in found.items():
        text = what.removeprefix(CUDA) + ("" if mode == GRAPH else f" ({mode})")
        rows.setdefault((suite, case, text), {})[what.startswith(CUDA)] = _verdict(goal)
    lines = [f"| {' | '.join(GPU_HEAD)} |", f"|{'---|' * len(GPU_HEAD)}"]
    for where, cells in rows.items():
        both = [*cells.get(False, ["-"] * 3), *cells.get(True, ["-"] * 3)]
        lines.append(f"| {' | '.join([*where, *both])} |")
    spreads = [g["aa_spread"] for _, _, g in found.values() if g["aa_spread"] is not None]
    equal = f"; equal code differed by up to {100 * max(spreads):.1f} %" if spreads else ""
    used = {path: machine for path, machine, _ in found.values()}
    machine = max(used.values(), key=lambda m: m["time"])
    ceilings = machine["ceilings"]
    copy, product = ceilings["bytes_per_s"] * 1e-12, ceilings["flops_per_s"] * 1e-12
    links = ", ".join(f"[{path.name}]({_relative(path)})" for path in sorted(used))
    lines += [
        "",
        f"{machine['gpu']}, torch {machine['torch']}, triton {machine['triton']}, bf16, cold "
        f"cache; in the same run a large copy reached {copy:.2f} TB/s and an 8192³ product "
        f"{product:.0f} TFLOP/s{equal}. "
        f"Record: {links}.",
    ]
    return "\n".join(lines)


def _verdict(goal: dict[str, Any]) -> list[str]:
    """Measured, bound, met."""
    measured = "-" if goal["measured"] is None else f"{goal['measured']:.2f} {goal['unit']}"
    bound = f"{'≥' if goal['at_least'] else '≤'} {goal['bound']:g} {goal['unit']}"
    return [measured, bound, {True: "yes", False: "no", None: "not measured"}[goal["met"]]]


def _goal_runs(path: Path) -> list[tuple[Path, dict[str, Any], list[dict[str, Any]]]]:
    """The GPU runs of a record that hold goals; a record may hold several runs."""
    found: list[tuple[Path, dict[str, Any], list[dict[str, Any]]]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["kind"] == "run":
            found.append((path, row, []))
        elif row["kind"] == "goal":
            found[-1][2].append(row)
    return [run for run in found if run[1]["gpu"] and run[2]]


def _relative(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
