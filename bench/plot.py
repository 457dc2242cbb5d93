"""Pictures of records: `python -m bench.plot RECORD... [--out FOLDER]`.

Only what the records hold is drawn: time over tokens with the hardware's floor, a roofline, whole
blocks and steps as bars, speed-up over width and rank, growth of memory. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench import records
from bench.case import BACKWARD, BOTH, FORWARD
from bench.records import Group, Row, Run

INK, FAINT, FLOOR = "#24292f", "#d0d7de", "#6e7781"
STYLE = {
    "cuda": "#d55e00",
    "triton": "#0072b2",
    "cpu": "#0072b2",
    "mmadapt": "#0072b2",
    "pill": "#0072b2",
    "mmadapt-compile": "#0072b2",
    "mmadapt-ops": "#0072b2",
    "reference": "#7fb8da",
    "eager": "#57606a",
    "where": "#57606a",
    "pill-eager": "#57606a",
    "aurora-eager": "#57606a",
    "frozen": "#b8bec5",
    "frozen-compile": "#b8bec5",
    "eager-packed": "#8c959f",
    "pill-released": "#8c959f",
    "compile": "#e69f00",
    "compile-max": "#a87300",
    "pill-compile": "#57606a",
    "aurora-compile": "#57606a",
    "manual": "#009e73",
    "lora-manual": "#009e73",
    "gemm-addmm": "#5d9c59",
    "peft-style": "#cc79a7",
    "peft-lora": "#cc79a7",
    "lora": "#cc79a7",
    "liger": "#882255",
    "grouped-mm": "#aa4499",
    "index": "#ddaacc",
    "frozen-gemm": "#b8bec5",
}
"""One colour a provider in every picture; ours are blue and vermilion."""
INPLACE = "-inplace"
DASHED = ("copy", "frozen-gemm", "reference")
DPI = 144


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("records", nargs="+", type=Path, metavar="RECORD")
    parser.add_argument("--out", type=Path, default=Path("plots"))
    arguments = parser.parse_args(argv)
    written = draw(records.runs(arguments.records), arguments.out)
    for path in written:
        print(path)
    if not written:
        print("nothing in these records can be drawn")
    return int(not written)


def draw(found: list[Run], folder: Path) -> list[Path]:
    """Every picture that the runs allow, as PNG; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in figures(found):
        FigureCanvasAgg(figure)
        path = folder / f"{name}.png"
        # Without the library's version in it, the file depends on the records alone.
        figure.savefig(path, dpi=DPI, facecolor="white", metadata={"Software": None})
        written.append(path)
    return written


def figures(found: list[Run]) -> Iterator[tuple[str, Figure]]:
    cases = records.cases(found)
    yield from over_tokens(cases)
    yield from roofline(cases)
    yield from blocks(cases)
    yield from heat(cases)
    yield from steps(records.newest(found, "step", records.step_key))
    yield from growth(records.newest(found, "growth", records.growth_key))


def slug(*parts: object) -> str:
    text = "-".join(str(part) for part in parts).lower()
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.tick_params(colors=INK)
        each.grid(True, color=FAINT, linewidth=0.6)
        each.set_axisbelow(True)
    return figure, list(axes)


def _source(figure: Figure, groups: Sequence[Group]) -> None:
    """A line under the picture: where and with what this was measured."""
    machine = groups[0].run.machine
    names = sorted({group.run.path.name for group in groups})
    device = machine["gpu"] or f"CPU (threads: {machine.get('threads', '?')})"
    text = f"{device}, torch {machine['torch']}; {', '.join(names)}"
    figure.supxlabel(text, fontsize=6.5, color=FLOOR)


def _colour(provider: str) -> str:
    return STYLE.get(provider.removesuffix(INPLACE), FLOOR)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _line(axes: Axes, name: str, x: list[float], rows: list[Row]) -> None:
    middle, low, high = ([r["ms"][p] for r in rows] for p in ("p50", "p20", "p80"))
    ours = records.is_ours(name)
    axes.plot(
        x, middle, label=name, color=_colour(name), marker="o", markersize=3.5,
        linewidth=2.2 if ours else 1.4, linestyle=(0, (3, 2)) if name in DASHED else "-",
        zorder=3 if ours else 2,
    )  # fmt: skip
    axes.fill_between(x, low, high, color=_colour(name), alpha=0.15, linewidth=0)


def over_tokens(cases: list[Group]) -> Iterator[tuple[str, Figure]]:
    """Time over tokens, forward beside forward and backward, the floor as a line."""
    series: dict[tuple, dict[str, list[Group]]] = {}
    for group in cases:
        shape = dict(group["shape"])
        shape.pop("tokens", None)
        key = (group["suite"], tuple(shape.items()), group["dtype"], group["mode"])
        series.setdefault(key, {}).setdefault(group["pass"], []).append(group)
    for (suite, shape, dtype, mode), passes in series.items():
        drawn = {
            kind: sorted(passes[kind], key=lambda g: g["shape"]["tokens"])
            for kind in (FORWARD, BACKWARD, BOTH)
            if len(passes.get(kind, ())) >= 3
        }
        if not drawn or "batch" in dict(shape):
            continue
        figure, axes = _figure(4.6 * len(drawn) + 1.4, 4.0, len(drawn))
        for each, (kind, groups) in zip(axes, drawn.items(), strict=True):
            _tokens_axes(each, groups)
            each.set_title(kind, fontsize=10, color=INK)
        axes[-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
        what = ", ".join(f"{n} {v}" if n != "variant" else str(v) for n, v in shape)
        figure.suptitle(f"{suite}: {what}, {dtype}, {mode}", fontsize=11, color=INK)
        _source(figure, [g for groups in drawn.values() for g in groups])
        yield slug("tokens", suite, *(v for _, v in shape), dtype, mode), figure


def _tokens_axes(axes: Axes, groups: list[Group]) -> None:
    names = dict.fromkeys(n for group in groups for n in group.by() if not records.is_again(n))
    for name in names:
        points = [
            (group["shape"]["tokens"], row)
            for group in groups
            if (row := group.by().get(name)) and "ms" in row
        ]
        if points:
            _line(axes, name, [t for t, _ in points], [row for _, row in points])
    tokens = [group["shape"]["tokens"] for group in groups]
    floors = [next(r["limit_ms"] for r in group.rows if "limit_ms" in r) for group in groups]
    axes.plot(tokens, floors, color=FLOOR, linewidth=1.4, linestyle=":", label="floor")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(tokens, [_count(t) for t in tokens])
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(_milliseconds))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel("tokens")
    axes.set_ylabel("milliseconds")


def _count(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def _milliseconds(value: float, _: object = None) -> str:
    return f"{value:g}"


def roofline(cases: list[Group]) -> Iterator[tuple[str, Figure]]:
    """Achieved rate over arithmetic intensity, under the roof of this machine's own ceilings."""
    for gpu in dict.fromkeys(group.run.machine["name"] for group in cases):
        groups = [g for g in cases if g.run.machine["name"] == gpu and _in_roofline(g)]
        if not groups:
            continue
        figure, (axes,) = _figure(7.6, 5.0)
        ceilings = groups[-1].run.machine["ceilings"]
        points: dict[str, list[tuple[float, float]]] = {}
        for group in groups:
            for name, row in group.by().items():
                if "ms" in row and not records.is_again(name) and name not in records.YARDSTICKS:
                    point = (row["tflops"] * 1e3 / row["gb_per_s"], row["tflops"])
                    points.setdefault(name, []).append(point)
        lowest = min(x for p in points.values() for x, _ in p) / 2
        highest = max(x for p in points.values() for x, _ in p) * 2
        edge = ceilings["flops_per_s"] / ceilings["bytes_per_s"]
        bend = [lowest, *([edge] if lowest < edge < highest else []), highest]
        roof = [min(ceilings["bytes_per_s"] * x, ceilings["flops_per_s"]) * 1e-12 for x in bend]
        axes.plot(bend, roof, color=INK, linewidth=1.5, label="measured ceilings")
        for name, place in sorted(points.items(), key=lambda item: records.is_ours(item[0])):
            x, y = zip(*place, strict=True)
            ours = records.is_ours(name)
            axes.scatter(
                x, y, label=name, s=34 if ours else 20, color=_colour(name),
                edgecolors="white", linewidths=0.6, zorder=3 if ours else 2,
                marker="o" if ours else "^",
            )  # fmt: skip
        axes.set(xscale="log", yscale="log")
        axes.set_xlabel("floating-point operations per algorithmic byte")
        axes.set_ylabel("TFLOP/s")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(ticker.FuncFormatter(_milliseconds))
            axis.set_minor_formatter(ticker.NullFormatter())
        axes.set_title("Under the roof: operators, all passes", fontsize=11, color=INK)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
        _source(figure, groups)
        yield slug("roofline", gpu), figure


def _in_roofline(group: Group) -> bool:
    return "batch" not in group["shape"]


def blocks(cases: list[Group]) -> Iterator[tuple[str, Figure]]:
    """Whole layers: milliseconds forward, forward and backward, and peak memory, as bars."""
    by_case: dict[tuple, dict[str, Group]] = {}
    for group in cases:
        if "batch" in group["shape"]:
            key = (group["suite"], group["case"], group["dtype"], group["mode"])
            by_case.setdefault(key, {})[group["pass"]] = group
    for (suite, case, dtype, mode), passes in by_case.items():
        panels: list[tuple[str, Callable[[Row], float | None], Group]] = [
            (f"{kind}, ms", lambda row: row.get("ms", {}).get("p50"), passes[kind])
            for kind in (FORWARD, BACKWARD, BOTH)
            if kind in passes
        ]
        last = panels[-1][2]
        if any(row.get("peak_bytes") for row in last.rows):
            panels.append((f"{last['pass']}, peak GB", _peak, last))
        figure = _bars(panels, "provider", f"{suite}: {case}, {dtype}, {mode}")
        _source(figure, list(passes.values()))
        yield slug(suite, case, dtype, mode), figure


def _peak(row: Row) -> float | None:
    return row["peak_bytes"] / 1e9 if row.get("peak_bytes") else None


def _bars(
    panels: list[tuple[str, Callable[[Row], float | None], Group]], key: str, title: str
) -> Figure:
    names = list(
        dict.fromkeys(
            row[key]
            for _, value, group in panels
            for row in group.rows
            if not records.is_again(row[key]) and value(row) is not None
        )
    )
    figure, axes = _figure(3.1 * len(panels) + 1.2, 1.3 + 0.34 * len(names), len(panels))
    for place, (each, (label, value, group)) in enumerate(zip(axes, panels, strict=True)):
        rows = group.by(key)
        lengths = [value(rows[n]) if n in rows else None for n in names]
        each.barh(
            names, [v or 0.0 for v in lengths], color=[_colour(n) for n in names],
            height=0.68,
        )  # fmt: skip
        for y, v in enumerate(lengths):
            each.text(
                v or 0.0, y, f" {_number(v)}" if v else " -", va="center", fontsize=8, color=INK
            )
        each.invert_yaxis()
        each.grid(False, axis="y")
        each.xaxis.set_major_locator(ticker.MaxNLocator(4))
        each.xaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: _number(v) if v else "0"))
        each.set_xlim(0, 1.18 * max([v for v in lengths if v] or [1.0]))
        each.set_title(label, fontsize=10, color=INK)
        if place:
            each.set_yticklabels([])
    figure.suptitle(title, fontsize=11, color=INK)
    return figure


def steps(groups: dict[tuple, Group]) -> Iterator[tuple[str, Figure]]:
    """Whole training steps: seconds and peak memory, with and without checkpointing."""
    pairs: dict[tuple, dict[bool, Group]] = {}
    for group in groups.values():
        names = ("geometry", "layers", "batch", "length", "rank", "adapter_dtype")
        pairs.setdefault(tuple(group[n] for n in names), {})[group["checkpointing"]] = group
    for key, found in pairs.items():
        geometry, layers, batch, length, *_ = key
        panels: list[tuple[str, Callable[[Row], float | None], Group]] = []
        for on, group in sorted(found.items()):
            how = "checkpointed" if on else "not checkpointed"
            panels.append((f"{how}, tokens/s", lambda row: row.get("tokens_per_s"), group))
            if any(row.get("peak_bytes") for row in group.rows):
                panels.append((f"{how}, peak GB", _peak, group))
        title = f"One training step: {geometry}, {layers} layers, {batch} x {length} tokens"
        figure = _bars(panels, "method", title)
        _source(figure, list(found.values()))
        yield slug("step", *key), figure


def heat(cases: list[Group]) -> Iterator[tuple[str, Figure]]:
    """Our speed-up over the best of the others, width against rank, at one number of tokens."""
    series: dict[tuple, dict[tuple[int, int], float]] = {}
    origin: dict[tuple, list[Group]] = {}
    for group in cases:
        shape = group["shape"]
        if not {"tokens", "dim", "rank", "variant"} <= shape.keys() or "batch" in shape:
            continue
        found = records.compare(group)
        if found is None:
            continue
        key = (
            group["suite"], shape["variant"], shape["tokens"], group["dtype"], group["pass"],
            group["mode"],
        )  # fmt: skip
        series.setdefault(key, {})[shape["dim"], shape["rank"]] = 1 / found.ratio
        origin.setdefault(key, []).append(group)
    for key, values in series.items():
        dims, ranks = sorted({d for d, _ in values}), sorted({m for _, m in values})
        if len(dims) < 2 or len(ranks) < 2:
            continue
        suite, variant, tokens, dtype, kind, mode = key
        figure, (axes,) = _figure(1.9 + 0.85 * len(ranks), 1.9 + 0.5 * len(dims))
        grid = [[values.get((d, m), math.nan) for m in ranks] for d in dims]
        _heat_axes(axes, grid)
        axes.set_xticks(range(len(ranks)), [str(m) for m in ranks])
        axes.set_yticks(range(len(dims)), [str(d) for d in dims])
        axes.set_xlabel("rank m")
        axes.set_ylabel("width d")
        title = f"{suite} {variant}, {kind}, T={tokens}\nspeed-up over the best of the others"
        axes.set_title(title, fontsize=10, color=INK)
        _source(figure, origin[key])
        yield slug("heat", suite, variant, tokens, dtype, kind, mode), figure


def _heat_axes(axes: Axes, grid: list[list[float]]) -> None:
    """Blue where we are faster, vermilion where slower; white is even. Colour is by logarithm."""
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("speed", ["#d55e00", "#ffffff", "#0072b2"])
    levels = [[math.log2(v) for v in row] for row in grid]
    reach = max([1.0, *(abs(v) for row in levels for v in row if not math.isnan(v))])
    axes.imshow(levels, cmap=colours, vmin=-reach, vmax=reach, aspect="auto")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            if not math.isnan(value):
                dark = abs(math.log2(value)) > 0.62 * reach
                axes.text(
                    x, y, f"{value:.2f}", ha="center", va="center", fontsize=9,
                    color="white" if dark else INK,
                )  # fmt: skip


def growth(groups: dict[tuple, Group]) -> Iterator[tuple[str, Figure]]:
    """Bytes kept, peak memory and time over tokens or layers, with proportional guides."""
    for key, group in groups.items():
        over = group["over"]
        wanted: list[tuple[str, str, Callable[[Row], Any]]] = [
            ("saved_bytes", "kept for backward, MB", lambda row: row["saved_bytes"] / 1e6),
            ("peak_bytes", "peak, MB", lambda row: row["peak_bytes"] / 1e6),
            ("ms", "forward+backward, ms", lambda row: row["ms"]),
        ]
        panels = [p for p in wanted if sum(bool(r.get(p[0])) for r in group.rows) >= 3]
        # One form alone, where the others failed, compares nothing.
        if not panels or len({row["provider"] for row in group.rows if row.get("ms")}) < 2:
            continue
        figure, axes = _figure(3.9 * len(panels) + 1.0, 3.7, len(panels))
        for each, (quantity, label, value) in zip(axes, panels, strict=True):
            for name in dict.fromkeys(row["provider"] for row in group.rows):
                points = [
                    (row["value"], value(row))
                    for row in group.rows
                    if row["provider"] == name and row.get(quantity)
                ]
                if points:
                    x, y = zip(*points, strict=True)
                    each.plot(
                        x, y, label=name, color=_colour(name), marker="o", markersize=3.5,
                        linewidth=2.2 if records.is_ours(name) else 1.4,
                    )  # fmt: skip
            each.set_xscale("log", base=2)
            each.set_yscale("log", base=2)
            ticks = sorted({row["value"] for row in group.rows})
            each.set_xticks(ticks[:: max(1, len(ticks) // 6)])
            each.xaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: _count(int(v))))
            each.yaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: _number(v)))
            each.set_xlabel("tokens" if over == "tokens" else "adapters one after the other")
            each.set_title(label, fontsize=10, color=INK)
        axes[-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
        what = f"Growth with {over}: routed adapter, d={group['dim']}, m={group['rank']}"
        figure.suptitle(what, fontsize=11, color=INK)
        _source(figure, [group])
        yield slug("growth", *key), figure


if __name__ == "__main__":
    raise SystemExit(main())
