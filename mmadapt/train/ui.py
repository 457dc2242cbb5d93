"""What a run prints: tables and progress bars, on the main process only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mmadapt.eval import EvalRow
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
        """ScienceQA's columns for every evaluated system, in percent."""
        if not rows:
            return
        table = Table("", title="held-out accuracy (%)")
        for column in rows[0].table.columns:
            table.add_column(column, justify="right")
        table.add_column("failed", justify="right")
        for row in rows:
            cells = [
                f"{row.table[column]:.2f}" if accuracy.total else "-"
                for column, accuracy in row.table.columns.items()
            ]
            table.add_row(row.name, *cells, str(row.table.failures))
        self._rich.print(table)

    def skills(self, rows: Sequence[EvalRow]) -> None:
        """Accuracy by skill, for sets that name skills."""
        skills = list(dict.fromkeys(skill for row in rows for skill in row.by_skill))
        if not skills:
            return
        table = Table("", title="by skill (%)")
        for skill in skills:
            table.add_column(skill, justify="right")
        for row in rows:
            found = [row.by_skill.get(skill) for skill in skills]
            cells = [f"{a.percent:.1f}" if a is not None and a.total else "-" for a in found]
            table.add_row(row.name, *cells)
        self._rich.print(table)
