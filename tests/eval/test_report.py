"""The page is read back: every table, every picture, nothing from outside."""

from __future__ import annotations

import base64
import dataclasses
import io
import os
import re
import shutil
import stat
import subprocess
from html.parser import HTMLParser

import pytest
from PIL import Image

from mmadapt.eval import RunInfo, RunResults
from mmadapt.eval.report import format_tables, write_report

TABLES = ["scienceqa", "skills", "forgetting", "ablation", "parameters", "wall_time"]
FIGURES = ["accuracy", "loss", "gate", "forgetting", "ablation"]
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Tables as lists of rows, image sources, ids, all attributes, text; checks nesting."""

    def __init__(self, html):
        super().__init__()
        self.tables, self.images, self.ids, self.attributes = {}, [], set(), []
        self.text, self._open, self._rows = "", [], None
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.attributes += [(tag, *item) for item in attrs.items()]
        self.ids.add(attrs.get("id"))
        if tag == "img":
            self.images.append(attrs)
        if tag == "table":
            self._rows = self.tables[attrs["id"].removeprefix("table-")] = []
        if tag == "tr":
            self._rows.append([])
        if tag in ("td", "th"):
            self._rows[-1].append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self._open and self._open[-1] in ("td", "th"):
            self._rows[-1][-1] += data


@pytest.fixture(scope="module")
def report(tmp_path_factory, run_results):
    files = write_report(tmp_path_factory.mktemp("run"), run_results)
    return files, Page(files.html.read_text())


@pytest.fixture
def small(run_results):
    """Results that are quick to draw."""
    return RunResults(run_results.info, forgetting=run_results.forgetting)


def decode(uri):
    head, data = uri.split(",", 1)
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
        image.load()
        return image


def test_every_table_stands_on_the_page_cell_by_cell(report, run_results):
    _, page = report
    tables = format_tables(run_results)
    assert [table.key for table in tables] == TABLES
    assert page.tables == {t.key: [t.columns, *t.rows] for t in tables}


def test_numbers_in_tables(run_results):
    tables = {t.key: t for t in format_tables(run_results)}
    header, pill = tables["scienceqa"].columns, tables["scienceqa"].rows[0]
    assert dict(zip(header, pill, strict=True))["IMG"] == "93.02"
    assert tables["scienceqa"].rows[-1][-2] == "800"
    assert tables["skills"].rows[0][:3] == ["which digit", "106", "93.4 [87.0, 96.8]"]
    assert tables["skills"].rows[0][-1] == "28.3"  # chance has no interval
    assert tables["forgetting"].rows[0][-1] == "-0.74"
    assert tables["parameters"].rows[-1][1:] == [
        "3,314,688",
        "110,592 (3.34 %)",
        "114,688 (3.46 %)",
    ]
    assert tables["wall_time"].rows[:3] == [
        ["align", "1 min 01 s"],
        ["instruct", "2 min 24 s"],
        ["evaluation", "1 h 01 min"],
    ]
    assert tables["ablation"].rows[0][1] == "93.0 [90.8, 95.2]"


def test_every_picture_is_embedded_and_saved(report):
    files, page = report
    assert list(files.figures) == FIGURES
    assert {f"figure-{name}" for name in FIGURES} <= page.ids
    embedded = [decode(image["src"]) for image in page.images]
    assert len(embedded) == len(FIGURES) + 3  # the gallery shows three
    assert all(image["alt"] for image in page.images)
    for path in files.figures.values():
        with Image.open(path) as image:
            assert image.width > 900
            assert len(image.convert("L").getcolors(256) or range(257)) > 16  # not a blank sheet
    assert embedded[-3].size == (8, 8)  # a small scan keeps its pixels
    assert embedded[-1].size == (256, 128)
    assert len(list((files.html.parent / "samples").glob("*.png"))) == 3


def test_nothing_comes_from_outside(report):
    files, page = report
    html = files.html.read_text()
    assert not re.findall(r"url\(|@import|https?://", html)
    assert {tag for tag, *_ in page.attributes} & {"script", "link", "iframe"} == set()
    sources = [value for _, name, value in page.attributes if name in ("src", "href")]
    assert all(source.startswith("data:image/png") for source in sources)


def test_text_of_the_data_is_escaped(report):
    files, page = report
    assert "<script" not in files.html.read_text()
    assert "<script>alert(1)</script> & <b>" in page.text


def test_metrics_file_is_the_results(report, run_results):
    files, _ = report
    assert RunResults.from_json(files.metrics.read_text()) == run_results


def test_empty_sections_are_left_out(tmp_path):
    files = write_report(tmp_path, RunResults(info=RunInfo("nothing yet", seed=0)))
    page = Page(files.html.read_text())
    assert files.figures == {}
    assert page.tables == {}
    assert page.images == []
    assert "nothing yet" in page.text


def test_without_skills_the_picture_shows_the_columns(tmp_path, run_results):
    rows = [dataclasses.replace(row, by_skill={}) for row in run_results.rows]
    results = RunResults(run_results.info, rows=rows)
    assert "accuracy" in write_report(tmp_path, results).figures
    assert "skills" not in {table.key for table in format_tables(results)}


def test_unreadable_sample_image_is_named_and_no_report_is_left(tmp_path, small, run_results):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    sample = dataclasses.replace(run_results.samples[0], images=[str(broken)])
    with pytest.raises(ValueError, match=r"sample image .*broken\.png: cannot be read"):
        write_report(tmp_path / "run", dataclasses.replace(small, samples=[sample]))
    assert not (tmp_path / "run" / "report.html").exists()


def test_a_failed_rewrite_keeps_the_old_report(tmp_path, small, monkeypatch):
    files = write_report(tmp_path / "run", small)
    old = files.html.read_bytes()

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        write_report(tmp_path / "run", dataclasses.replace(small, forgetting=None))
    assert files.html.read_bytes() == old
    assert [p.name for p in files.html.parent.rglob(".*")] == []


def test_the_report_is_readable_by_others(report):
    files, _ = report
    assert stat.S_IMODE(files.html.stat().st_mode) == 0o644


def chromium():
    found = shutil.which("chromium")
    if found is None:
        if os.environ.get("MMADAPT_REQUIRE_CHROMIUM") == "1":
            pytest.fail("MMADAPT_REQUIRE_CHROMIUM=1, but no chromium is on PATH")
        pytest.skip("no chromium on PATH")
    return found


def browse(page, profile, *arguments, width=1000):
    command = [
        chromium(),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={profile}",
        f"--window-size={width},1400",
        *arguments,
        page.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


MEASURE = """<script>addEventListener("load", () => {
  const rows = [...document.images].map(i => `${i.naturalWidth}x${i.clientWidth}`);
  const heights = [...document.querySelectorAll("table")].map(t => `${t.id}:${t.clientHeight}`);
  const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  const note = document.createElement("p");
  note.id = "measured";
  note.textContent = [rows.join(" "), heights.join(" "), wide].join("|");
  document.body.append(note);
})</script></body>"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [1000, 500])
def test_tables_and_pictures_render_in_a_browser(report, tmp_path, width):
    files, page = report
    html = files.html.read_text()
    policy = re.search(r"<meta http-equiv=\"Content-Security-Policy\".*?>", html)[0]
    copy = tmp_path / "measured.html"
    copy.write_text(html.replace(policy, "").replace("</body>", MEASURE))
    dom = browse(copy, tmp_path / "profile", "--dump-dom", width=width)
    images, tables, overflow = re.search(r'<p id="measured">(.*?)</p>', dom)[1].split("|")
    sizes = [tuple(map(int, image.split("x"))) for image in images.split()]
    assert len(sizes) == len(page.images)
    assert all(natural > 0 and shown > 0 for natural, shown in sizes)
    heights = dict(item.split(":") for item in tables.split())
    assert list(heights) == [f"table-{key}" for key in page.tables]
    assert all(int(height) > 40 for height in heights.values())
    assert int(overflow) == 0  # wide tables scroll in their own box, never the page

    picture = tmp_path / "page.png"
    browse(files.html, tmp_path / "profile", f"--screenshot={picture}", width=width)
    with Image.open(picture) as image:
        colours = image.convert("RGB").getcolors(2**24)
    assert len(colours) > 200


@pytest.mark.slow
def test_the_page_forbids_scripts(report, tmp_path):
    files, _ = report
    copy = tmp_path / "attacked.html"
    copy.write_text(files.html.read_text().replace("</body>", MEASURE))
    assert 'id="measured"' not in browse(copy, tmp_path / "profile", "--dump-dom")
