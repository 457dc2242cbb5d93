"""Methods side by side: plain dataclasses for `metrics.json`, a table, a page."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from mmadapt.eval import _atomic, _json
from mmadapt.eval.report.tables import duration

COMPARISON_SCHEMA = 1


@dataclass(frozen=True)
class MethodRow:
    """One method, or a baseline that trains nothing.

    `scores` are percentages by column. `seconds` of training; `saved_mib` kept for backward by one
    step and `state_mib` of gradients, optimizer and momentum copies; `peak_mib` on a GPU.
    """

    name: str
    scores: dict[str, float]
    trainable: int = 0
    seconds: float | None = None
    saved_mib: float | None = None
    state_mib: float | None = None
    peak_mib: float | None = None
    steps: int | None = None
    loss: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Comparison:
    """A finished run; `Comparison.from_json(c.to_json())` gives an equal object."""

    title: str
    task: str
    columns: list[str]
    rows: list[MethodRow]
    parameters: int
    seed: int
    model: str
    data: str
    device: str
    versions: dict[str, str]
    config: dict[str, Any] = field(default_factory=dict)
    schema: int = COMPARISON_SCHEMA

    def to_json(self, *, indent: int | None = 1) -> str:
        return _json.dumps(self, indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """Raises ValueError for text that is not of this schema."""
        found = _json.loads(cls, text)
        if found.schema != COMPARISON_SCHEMA:
            raise ValueError(f"schema: got {found.schema}, expected {COMPARISON_SCHEMA}")
        return found


def comparison_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Head and rows as strings: one source for the page, the terminal and the documents."""
    head = ["method", "trained", "share", *comparison.columns, "time", "saved", "state"]
    rows = []
    for row in comparison.rows:
        share = f"{100 * row.trainable / comparison.parameters:.2f} %"
        rows.append(
            [
                row.name,
                f"{row.trainable:,}" if row.trainable else "–",
                share if row.trainable else "–",
                *(f"{row.scores[column]:.1f}" for column in comparison.columns),
                "–" if row.seconds is None else duration(row.seconds),
                _mib(row.saved_mib),
                _mib(row.state_mib),
            ]
        )
    return head, rows


def write_comparison(run_dir: Path, comparison: Comparison) -> Path:
    """Write `metrics.json` and `report.html`; returns the page."""
    run_dir.mkdir(parents=True, exist_ok=True)
    _atomic.write_text(run_dir / "metrics.json", comparison.to_json() + "\n")
    page = run_dir / "report.html"
    _atomic.write_text(page, _page(comparison))
    return page


def _mib(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f} MiB"


_STYLE = """body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem;
color:#22262b}table{border-collapse:collapse;width:100%}th,td{padding:.3rem .6rem;text-align:right;
border-bottom:1px solid #d9dde2}th:first-child,td:first-child{text-align:left}
.scroll{overflow-x:auto}svg{width:100%;height:auto}p.note{color:#5b6470}"""
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9")


def _page(comparison: Comparison) -> str:
    head, rows = comparison_table(comparison)
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    facts = ", ".join(f"{name} {version}" for name, version in comparison.versions.items())
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(comparison.title)}</title><style>{_STYLE}</style></head><body>
<h1>{escape(comparison.title)}</h1>
<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>
<p class="note">Scores are percentages. Saved: tensors one training step keeps for its backward
pass. State: gradients, optimizer state and momentum copies. The model has
{comparison.parameters:,} parameters.</p>
<h2>Training loss</h2>{_curves(comparison.rows)}
<p class="note">Seed {comparison.seed}; model {escape(comparison.model)}; data
{escape(comparison.data)}; {escape(comparison.device)}; {escape(facts)}.</p></body></html>
"""


def _curves(rows: list[MethodRow]) -> str:
    """Loss over steps as an SVG of lines, drawn without a plotting library."""
    drawn = [row for row in rows if len(row.loss) > 1]
    if not drawn:
        return "<p>No method was trained for more than one logged step.</p>"
    width, height, left, bottom = 720, 320, 50, 30
    last = max(step for row in drawn for step, _ in row.loss)
    top = max(loss for row in drawn for _, loss in row.loss)
    lines = []
    for place, row in enumerate(drawn):
        colour = _COLOURS[place % len(_COLOURS)]
        points = " ".join(
            f"{left + (width - left) * step / last:.1f},{(height - bottom) * (1 - loss / top):.1f}"
            for step, loss in row.loss
        )
        lines.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        lines.append(
            f'<text x="{width - 10}" y="{20 + 18 * place}" fill="{colour}" text-anchor="end">'
            f"{escape(row.name)}</text>"
        )
    axis = f'<path d="M{left} 0V{height - bottom}H{width}" fill="none" stroke="#8a9099"/>'
    marks = (
        f'<text x="0" y="14">{top:.2f}</text><text x="0" y="{height - bottom}">0</text>'
        f'<text x="{width}" y="{height - 8}" text-anchor="end">step {last}</text>'
    )
    return f'<svg viewBox="0 0 {width} {height}" role="img">{axis}{marks}{"".join(lines)}</svg>'
