"""Results as tables of strings: one source for the page and for the terminal."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mmadapt.eval.results import Ablation, Accuracy, EvalRow, RunResults, Transfer
from mmadapt.eval.scienceqa import COLUMNS


@dataclass(frozen=True)
class Table:
    """`rows` hold one string per column; the first column is the row's name."""

    key: str
    title: str
    columns: list[str]
    rows: list[list[str]]


def format_tables(results: RunResults) -> list[Table]:
    """Every table the results can fill, in the order of the report."""
    tables = [
        _scienceqa(results),
        _skills(results),
        _forgetting(results),
        _transfer(results.transfer),
        _ablation(results.ablation),
        _parameters(results),
        _wall_time(results),
    ]
    return [table for table in tables if table is not None]


def percent(value: float, digits: int = 2) -> str:
    """A percentage, or a dash where there was nothing to measure."""
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def with_interval(value: float, interval: tuple[float, float]) -> str:
    """ "93.1 [91.0, 94.8]", or the value alone when its spread is unknown."""
    if math.isnan(value) or math.isnan(interval[0]):
        return percent(value, 1)
    return f"{value:.1f} [{interval[0]:.1f}, {interval[1]:.1f}]"


def accuracy_text(accuracy: Accuracy | None, *, expected: bool = False) -> str:
    if accuracy is None:
        return "–"
    if expected:
        return percent(accuracy.percent, 1)
    return with_interval(accuracy.percent, accuracy.interval)


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _scienceqa(results: RunResults) -> Table | None:
    if not results.rows:
        return None
    rows = [
        [row.name, *(percent(row.table[column]) for column in COLUMNS), _failures(row)]
        for row in results.rows
    ]
    counts = results.rows[0].table.columns
    rows.append(["questions", *(f"{counts[column].total:,}" for column in COLUMNS), ""])
    return Table("scienceqa", "Accuracy, %", ["system", *COLUMNS, "no answer"], rows)


def _failures(row: EvalRow) -> str:
    return "–" if row.expected else f"{row.table.failures:,}"


def _skills(results: RunResults) -> Table | None:
    skills = list(results.rows[0].by_skill) if results.rows else []
    if not skills:
        return None
    groups = [(skill, [row.by_skill.get(skill) for row in results.rows]) for skill in skills]
    groups.append(("all with image", [row.visual for row in results.rows]))
    groups.append(("all text-only", [row.text_only for row in results.rows]))
    rows = [
        [
            name,
            f"{next((a.total for a in cells if a), 0):,}",
            *(
                accuracy_text(cell, expected=row.expected)
                for row, cell in zip(results.rows, cells, strict=True)
            ),
        ]
        for name, cells in groups
        if any(cells)
    ]
    columns = ["skill", "questions", *(row.name for row in results.rows)]
    return Table("skills", "Accuracy by skill, % with 95 % interval", columns, rows)


def _forgetting(results: RunResults) -> Table | None:
    change = results.forgetting
    if change is None:
        return None
    before, after = change.before, change.after
    rows = [
        [
            "accuracy, %",
            accuracy_text(before.accuracy),
            accuracy_text(after.accuracy),
            f"{change.accuracy_delta:+.2f}",
        ],
        [
            "perplexity",
            f"{before.perplexity:.4g}",
            f"{after.perplexity:.4g}",
            f"{change.perplexity_delta:+.3g}",
        ],
    ]
    return Table(
        "forgetting", "Text-only questions", ["measure", "before", "after", "change"], rows
    )


def _transfer(transfer: Transfer | None) -> Table | None:
    if transfer is None:
        return None
    rows = [
        ["new task", *map(accuracy_text, transfer.target), ""],
        *(
            [name, *map(accuracy_text, pair), accuracy_text(transfer.restored.get(name))]
            for name, pair in transfer.source.items()
        ),
    ]
    if transfer.drift is not None:
        drift = transfer.drift
        rows.append(["nats per answer token", f"{drift.before:.4g}", f"{drift.after:.4g}", ""])
    title = (
        f"One more task: gain E = {transfer.gain:+.3f}, forgetting F = {transfer.forgetting:+.3f} "
        f"(worst {transfer.worst_forgetting:+.3f}), O = {transfer.overall:+.3f}, H = "
        f"{transfer.harmonic_mean:.3f}, retention R = {transfer.retention:.3f}"
    )
    return Table(
        "transfer", title, ["task", "before, %", "after, %", "old adapter put back, %"], rows
    )


def _ablation(ablation: Ablation | None) -> Table | None:
    if ablation is None:
        return None
    rows = [
        [row.name, *(with_interval(row.mean(c), row.interval(c)) for c in ablation.columns)]
        for row in ablation.rows
    ]
    title = f"Mean and 95 % interval over {len(ablation.seeds)} seed(s)"
    return Table("ablation", title, ["configuration", *ablation.columns], rows)


def _parameters(results: RunResults) -> Table | None:
    if not results.parameters:
        return None
    stages = list(dict.fromkeys(s for row in results.parameters for s in row.trainable))
    total = sum(row.parameters for row in results.parameters)
    trained = {s: sum(row.trainable.get(s, 0) for row in results.parameters) for s in stages}
    rows = [
        [
            row.component,
            f"{row.parameters:,}",
            *(f"{row.trainable[s]:,}" if row.trainable.get(s) else "frozen" for s in stages),
        ]
        for row in results.parameters
    ]
    sums = (f"{trained[s]:,} ({100 * trained[s] / max(total, 1):.2f} %)" for s in stages)
    rows.append(["total", f"{total:,}", *sums])
    columns = ["component", "parameters", *(f"trained in {s}" for s in stages)]
    return Table("parameters", "Parameters by component", columns, rows)


def _wall_time(results: RunResults) -> Table | None:
    times = results.info.wall_seconds
    if not times:
        return None
    rows = [[name, duration(seconds)] for name, seconds in times.items()]
    rows.append(["total", duration(sum(times.values()))])
    return Table("wall_time", "Wall time", ["step", "time"], rows)
