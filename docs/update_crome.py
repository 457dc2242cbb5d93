"""Fill in docs/crome.md's numbers from docs/demo/crome_metrics.json: `[--check]`.

The table goes between the `<!-- demo:begin -->` and `<!-- demo:end -->` marks. `--check` changes
nothing and fails when the page is not what the record says.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from update_readme import fill

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "crome.md"
RECORD = ROOT / "docs" / "demo" / "crome_metrics.json"


def main(arguments: list[str]) -> int:
    text = PAGE.read_text(encoding="utf-8")
    filled = fill(text, "demo", demo(json.loads(RECORD.read_text(encoding="utf-8"))))
    if "--check" in arguments:
        if filled != text:
            print("docs/crome.md differs from the record; run python docs/update_crome.py")
        return int(filled != text)
    PAGE.write_text(filled, encoding="utf-8")
    return 0


def demo(results: dict[str, Any]) -> str:
    """Every task before and after stage (c), text alone, and the ablation rows that were run."""
    transfer = results["transfer"]
    lines = [
        "| held-out accuracy, % | before stage (c) | after | old adapter put back |",
        "|---|---|---|---|",
    ]
    rows = {"new task: scans upside down": [*transfer["target"], None]}
    for name, pair in transfer["source"].items():
        rows[f"earlier: {name}"] = [*pair, transfer["restored"][name]]
    for name, cells in rows.items():
        lines.append(f"| {name} | {' | '.join(map(_percent, cells))} |")
    blank = next(row for row in results["rows"] if row["name"] == "images blanked")
    before, after = (results["forgetting"][when] for when in ("before", "after"))
    drift = transfer["drift"]
    trained = {row["component"]: row["trainable"]["task"] for row in results["parameters"]}
    minutes = sum(results["info"]["wall_seconds"].values()) / 60
    lines += [
        "",
        f"Stage (c) trains {trained['adapter']:,} weights. With blanked images the new task is at "
        f"{_percent(blank['visual'])} %. Earlier answers cost {drift['before']:.3f} nats per token "
        f"before and {drift['after']:.3f} after. Text alone: {_percent(before['accuracy'])} % and "
        f"perplexity {before['perplexity']} before any training, "
        f"{_percent(after['accuracy'])} % and {after['perplexity']} after all of it. The stages "
        f"took {minutes:.1f} minutes ({results['info']['device']}). One seed, "
        f"{transfer['target'][0]['total']} new questions: a few points are no difference. "
        "Record: [crome_metrics.json](demo/crome_metrics.json).",
    ]
    return "\n".join(lines + ablation(results["ablation"]))


def ablation(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return []
    head = [f"{len(found['seeds'])} seed(s), %", *found["columns"]]
    lines = ["", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in found["rows"]:
        means = [_mean(row["values"][column]) for column in found["columns"]]
        lines.append(f"| {row['name']} | {' | '.join(means)} |")
    return lines


def _mean(values: list[float | str]) -> str:
    numbers = [float(value) for value in values]
    mean = sum(numbers) / len(numbers)
    return "-" if mean != mean else f"{mean:.1f}"


def _percent(accuracy: dict[str, Any] | None) -> str:
    if accuracy is None or not accuracy["total"]:
        return "-"
    return f"{100 * accuracy['correct'] / accuracy['total']:.1f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
