"""Fill in the tables of aurora_training.md from committed runs: `update_aurora.py [--check]`.

Each table comes from a `metrics.json` that `mmadapt train aurora_digits_*` wrote, committed as
docs/demo/aurora_retrieval_metrics.json and aurora_vqa_metrics.json. `--check` changes nothing and
fails when the page is not what the records say.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mmadapt.eval import Comparison, comparison_table

sys.path.insert(0, str(Path(__file__).parent))
from update_readme import fill

FOLDER = Path(__file__).resolve().parent
PAGE = FOLDER / "aurora_training.md"
RECORDS = {
    "aurora-retrieval": "demo/aurora_retrieval_metrics.json",
    "aurora-vqa": "demo/aurora_vqa_metrics.json",
}


def table(record: str) -> str:
    comparison = Comparison.from_json((FOLDER / record).read_text(encoding="utf-8"))
    head, rows = comparison_table(comparison)
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    steps = {row.steps for row in comparison.rows if row.steps}
    facts = f"{', '.join(map(str, sorted(steps)))} steps a method, seed {comparison.seed}"
    return "\n".join([*lines, "", f"{facts}, {comparison.device}; record: [{record}]({record})."])


def main(arguments: list[str]) -> int:
    text = filled = PAGE.read_text(encoding="utf-8")
    for name, record in RECORDS.items():
        filled = fill(filled, name, table(record))
    if "--check" in arguments:
        if filled != text:
            print(f"{PAGE.name} differs from the records; run python docs/update_aurora.py")
        return int(filled != text)
    PAGE.write_text(filled, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
