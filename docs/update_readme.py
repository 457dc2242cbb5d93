"""Fill in the README's numbers from committed records: `python docs/update_readme.py [--check]`.

Between `<!-- demo:begin -->` and `<!-- demo:end -->` goes the demo's result (docs/demo), between
the `bench` marks the newest record of bench/results. `--check` changes nothing and fails when the
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
    filled = fill(fill(text, "demo", demo_table()), "bench", bench_table())
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
        raise SystemExit(f"README.md: expected the marks {begin} and {end} exactly once")
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
    """Medians of the newest CPU record, and the ratio of eager to the fused kernel."""
    record = sorted((ROOT / "bench" / "results").glob("*-cpu-*.json"))[-1]
    run = json.loads(record.read_text(encoding="utf-8"))
    times: dict[str, dict[str, float]] = {}
    for bench in run["benchmarks"]:
        kind = bench["group"].split(" Problem")[0]
        provider = bench["extra_info"]["provider"]
        times.setdefault(kind, {})[provider] = bench["stats"]["median"]
    providers = list(next(iter(times.values())))
    lines = [
        f"| SwiGLU adapter, ms (median) | {' | '.join(providers)} | eager / fused |",
        f"|{'---|' * (len(providers) + 2)}",
    ]
    for kind, row in times.items():
        cells = " | ".join(f"{1e3 * row[provider]:.1f}" for provider in providers)
        lines.append(f"| {kind} | {cells} | {row['eager'] / row['cpu']:.2f} |")
    shape = run["benchmarks"][0]["group"].split("Problem(")[1].rstrip(")").replace("torch.", "")
    path = record.relative_to(ROOT)
    lines += ["", f"{shape}; two threads. Record: [{path.name}]({path})."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
