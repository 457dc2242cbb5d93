"""From results to files: `report.html`, `metrics.json`, `figures/*.png`, `samples/*.png`."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmadapt.eval._atomic import write_bytes, write_text
from mmadapt.eval.report.tables import format_tables
from mmadapt.eval.results import Accuracy, RunResults, SampleAnswer


@dataclass(frozen=True)
class ReportFiles:
    """What `write_report` wrote."""

    html: Path
    metrics: Path
    figures: dict[str, Path]


def write_report(out_dir: str | Path, results: RunResults) -> ReportFiles:
    """Write the report into `out_dir` (made if missing) and return its files.

    The page is one file: style and pictures are inside, nothing is loaded from elsewhere and no
    script may run. The pictures are written as PNGs beside it as well. Each file is replaced in
    one step; `report.html` comes last.

    Raises:
        ImportError: jinja2, matplotlib or Pillow is missing.
        ValueError: an image of a sample cannot be read.
    """
    try:
        import jinja2

        from mmadapt.eval.report.figures import draw_figures
        from mmadapt.eval.report.thumbnails import thumbnail
    except ImportError as error:
        raise ImportError(f"write_report: {error}; pip install 'mmadapt[demo]'") from error

    out = Path(out_dir)
    figures = draw_figures(results)
    scans = [[thumbnail(path) for path in sample.images] for sample in results.samples]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mmadapt.eval.report", package_path=""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("template.html").render(
        info=results.info,
        headline=_headline(results),
        tables={table.key: table for table in format_tables(results)},
        figures={name: _data_uri(png) for name, png in figures.items()},
        samples=[
            _card(sample, [_data_uri(scan) for scan in row])
            for sample, row in zip(results.samples, scans, strict=True)
        ],
        config=json.dumps(results.info.config, indent=2, ensure_ascii=False),
    )

    paths = {name: out / "figures" / f"{name}.png" for name in figures}
    for folder in (out / "figures", out / "samples"):
        folder.mkdir(parents=True, exist_ok=True)
    for name, png in figures.items():
        write_bytes(paths[name], png)
    for i, row in enumerate(scans):
        for j, scan in enumerate(row):
            write_bytes(out / "samples" / f"{i:02d}_{j}.png", scan)
    write_text(out / "metrics.json", results.to_json())
    write_text(out / "report.html", html)
    return ReportFiles(out / "report.html", out / "metrics.json", paths)


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _headline(results: RunResults) -> list[dict[str, str]]:
    """Label and value of the numbers at the top of the page."""
    cards = [
        _visual_card(row.name, row.visual, row.expected)
        for row in results.rows
        if row.visual is not None
    ]
    if results.forgetting is not None:
        change = results.forgetting
        cards.append(
            {
                "label": "text-only, before to after",
                "value": f"{change.accuracy_delta:+.1f}",
                "unit": "points",
                "detail": f"{change.before.accuracy.percent:.1f} % to "
                f"{change.after.accuracy.percent:.1f} %",
            }
        )
    return cards


def _visual_card(name: str, visual: Accuracy, expected: bool) -> dict[str, str]:
    low, high = visual.interval
    return {
        "label": f"{name}, questions with image",
        "value": f"{visual.percent:.1f}",
        "unit": "%",
        "detail": "expected" if expected else f"95 %: {low:.1f} to {high:.1f}",
    }


def _card(sample: SampleAnswer, images: list[str]) -> dict[str, Any]:
    return {
        "sample": sample,
        "images": images,
        "letters": [chr(ord("A") + i) for i in range(len(sample.choices))],
    }
