"""The report's pictures as PNG bytes.

Drawn on `Figure` objects directly: no pyplot, so no global backend is chosen for the caller.
Colours are Okabe and Ito's, distinguishable without colour vision; shapes differ as well.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mmadapt.eval.results import (
    Ablation,
    Accuracy,
    EvalRow,
    Forgetting,
    GateProfile,
    RunResults,
    StageCurve,
)

_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9")
_INK, _FAINT = "#22262b", "#d9dde2"
_WIDTH = 6.0  # inches; with _DPI wide enough for a sharp page and readable at phone width
_DPI = 180
_STYLE = {
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": "#8a9099",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
}


def draw_figures(results: RunResults) -> dict[str, bytes]:
    """Name -> PNG of every picture the results can fill."""
    with rc_context(_STYLE):
        figures: dict[str, Figure] = {}
        if results.rows:
            figures["accuracy"] = _accuracy(results.rows)
        if any(curve.points for curve in results.stages):
            figures["loss"] = _loss([curve for curve in results.stages if curve.points])
        if results.gate is not None:
            figures["gate"] = _gate(results.gate)
        if results.forgetting is not None:
            figures["forgetting"] = _forgetting(results.forgetting)
        if results.ablation is not None:
            figures["ablation"] = _ablation(results.ablation)
        return {name: _png(figure) for name, figure in figures.items()}


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, facecolor="white")
    return buffer.getvalue()


def _bar_errors(cells: Sequence[Accuracy]) -> list[list[float]]:
    """Distances from the value to its interval, the shape matplotlib wants: [2, n]."""
    low = [max(0.0, cell.percent - cell.interval[0]) for cell in cells]
    high = [max(0.0, cell.interval[1] - cell.percent) for cell in cells]
    return [low, high]


def _accuracy(rows: Sequence[EvalRow]) -> Figure:
    """Horizontal bars per skill (per ScienceQA column if there are no skills)."""
    groups = list(rows[0].by_skill) or list(rows[0].table.columns)
    cells = [row.by_skill or row.table.columns for row in rows]
    groups = [group for group in groups if cells[0][group].total]
    measured = [i for i, row in enumerate(rows) if not row.expected]
    height = 0.8 / max(len(measured), 1)
    figure = Figure(
        figsize=(_WIDTH, 1.1 + len(groups) * (0.16 + 0.17 * len(measured))), layout="constrained"
    )
    axes = figure.add_subplot()
    for place, i in enumerate(measured):
        shown = [(y, cells[i][g]) for y, g in enumerate(groups) if g in cells[i]]
        offset = (place - (len(measured) - 1) / 2) * height
        axes.barh(
            [y + offset for y, _ in shown],
            [cell.percent for _, cell in shown],
            height * 0.92,
            xerr=_bar_errors([cell for _, cell in shown]),
            color=_COLOURS[place % len(_COLOURS)],
            error_kw={"ecolor": _INK, "elinewidth": 1, "capsize": 2},
            label=rows[i].name,
        )
    for i, row in enumerate(rows):
        if row.expected:
            shown = [(y, cells[i][g]) for y, g in enumerate(groups) if g in cells[i]]
            axes.vlines(
                [cell.percent for _, cell in shown],
                [y - 0.45 for y, _ in shown],
                [y + 0.45 for y, _ in shown],
                color=_INK,
                linestyle=(0, (2, 1.5)),
                linewidth=1.4,
                label=row.name,
            )
    axes.set_yticks(range(len(groups)), groups)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("accuracy, %")
    _grid(axes, "x")
    by_name = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    names = [row.name for row in rows]  # matplotlib lists lines before bars, whatever the order
    figure.legend([by_name[name] for name in names], names, loc="outside upper left", ncols=2)
    return figure


def _loss(curves: Sequence[StageCurve]) -> Figure:
    """One panel per stage; the thin line is what was logged, the thick one its running mean."""
    columns = min(len(curves), 2)
    lines = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(_WIDTH, 2.7 * lines), layout="constrained")
    for place, curve in enumerate(curves):
        axes = figure.add_subplot(lines, columns, place + 1)
        steps = [step for step, _ in curve.points]
        losses = [loss if math.isfinite(loss) else math.nan for _, loss in curve.points]
        axes.plot(steps, losses, color=_COLOURS[0], alpha=0.35, linewidth=0.9)
        axes.plot(steps, _running_mean(losses), color=_COLOURS[0], linewidth=1.8)
        axes.set_title(curve.stage, loc="left", fontsize=10, fontweight="bold")
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss, nats per token")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        _grid(axes, "y")
    return figure


def _running_mean(values: Sequence[float]) -> list[float]:
    """Centred mean over 5 % of the curve, ignoring gaps."""
    half = max(1, len(values) // 40)
    means = []
    for i in range(len(values)):
        window = [v for v in values[max(0, i - half) : i + half + 1] if not math.isnan(v)]
        means.append(sum(window) / len(window) if window else math.nan)
    return means


def _gate(gate: GateProfile) -> Figure:
    figure = Figure(figsize=(_WIDTH, 2.5), layout="constrained")
    axes = figure.add_subplot()
    axes.bar(range(len(gate.mean_abs)), gate.mean_abs, color=_COLOURS[0], width=0.75)
    axes.set_xlabel("decoder layer (0 is next to the input)")
    axes.set_ylabel("mean |tanh gate|")
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    _grid(axes, "y")
    return figure


def _forgetting(change: Forgetting) -> Figure:
    figure = Figure(figsize=(_WIDTH, 1.5), layout="constrained")
    axes = figure.add_subplot()
    cells = [change.before.accuracy, change.after.accuracy]
    axes.barh(
        ["before", "after"],
        [cell.percent for cell in cells],
        0.6,
        xerr=_bar_errors(cells),
        color=["#9aa1ab", _COLOURS[0]],
        error_kw={"ecolor": _INK, "elinewidth": 1, "capsize": 3},
    )
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 100)
    axes.set_xlabel("text-only accuracy, %")
    _grid(axes, "x")
    return figure


def _ablation(ablation: Ablation) -> Figure:
    """A panel per column: mean and interval per configuration, single seeds as rings."""
    figure = Figure(figsize=(_WIDTH, 0.9 + 0.32 * len(ablation.rows)), layout="constrained")
    names = [row.name for row in ablation.rows]
    panels = figure.subplots(1, len(ablation.columns), sharey=True, squeeze=False)[0]
    for axes, column in zip(panels, ablation.columns, strict=True):
        for y, row in enumerate(ablation.rows):
            low, high = row.interval(column)
            if not math.isnan(low):
                axes.hlines(y, low, high, color=_COLOURS[0], linewidth=2)
            values = row.values[column]
            axes.plot(values, [y] * len(values), "o", mfc="none", mec="#8a9099", ms=5)
            axes.plot([row.mean(column)], [y], "D", color=_COLOURS[0], ms=5)
        axes.set_xlabel(column)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        _grid(axes, "x")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    return figure


def _grid(axes: Axes, axis: str) -> None:
    axes.grid(axis=axis, color=_FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
