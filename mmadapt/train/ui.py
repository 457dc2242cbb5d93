"""What a run prints: tables and progress bars, on the main process only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mmadapt.eval import Accuracy, Comparison, EvalRow, comparison_table
from mmadapt.train.components import ComponentCount


class Console:
    """Prints when `quiet` is false; ranks other than the first one are quiet."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._rich = RichConsole(quiet=quiet, highlight=False, soft_wrap=True)
        self.quiet = quiet

    def say(self, text: str) -> None:
        self._rich.print(text, markup=False)

    @contextmanager
    def progress(self, description: str) -> Iterator[Callable[[int, int], None]]:
        """A bar; yields the callback (done, total) that moves it."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeElapsedColumn(), console=self._rich) as bar:
            task = bar.add_task(description, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)

    def parameters(self, stage: str, counts: Sequence[ComponentCount]) -> None:
        """Trainable parameters by component, as a stage begins."""
        table = Table("component", title=f"stage {stage}")
        table.add_column("parameters", justify="right")
        table.add_column("trainable", justify="right")
        for row in counts:
            shown = f"{row.trainable:,}" if row.trainable else "frozen"
            table.add_row(row.component, f"{row.parameters:,}", shown)
        total = sum(row.parameters for row in counts)
        trained = sum(row.trainable for row in counts)
        table.add_section()
        table.add_row("total", f"{total:,}", f"{trained:,} ({100 * trained / max(total, 1):.2f} %)")
        self._rich.print(table)

    def results(self, rows: Sequence[EvalRow]) -> None:
        """ScienceQA's columns and the skills, if the set names any, for every evaluated system.

        Systems stand side by side: nine columns beside a name do not fit into 80 characters.
        """
        if not rows:
            return
        table = _side_by_side("held-out accuracy (%)", rows)
        for column in rows[0].table.columns:
            table.add_row(column, *(_percent(row.table.columns[column], 2) for row in rows))
        table.add_row("no answer found", *(str(row.table.failures) for row in rows))
        table.add_section()
        for skill in dict.fromkeys(skill for row in rows for skill in row.by_skill):
            table.add_row(skill, *(_percent(row.by_skill.get(skill), 1) for row in rows))
        self._rich.print(table)

    def comparison(self, comparison: Comparison) -> None:
        """Methods side by side: each is a column, since their columns do not fit beside a name."""
        head, rows = comparison_table(comparison)
        table = Table(title=comparison.title, box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("", no_wrap=True)
        for row in rows:
            table.add_column(row[0], justify="right")
        for place, name in enumerate(head[1:], start=1):
            table.add_row(name, *(row[place] for row in rows))
        self._rich.print(table)


def _side_by_side(title: str, rows: Sequence[EvalRow]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for row in rows:
        table.add_column(row.name, justify="right")
    return table


def _percent(accuracy: Accuracy | None, digits: int) -> str:
    return f"{accuracy.percent:.{digits}f}" if accuracy is not None and accuracy.total else "-"
