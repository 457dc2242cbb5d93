"""docs/performance.md is what the records say, and says where we lose."""

import importlib.util
import re
from pathlib import Path

import pytest

from bench import records
from tests.bench import synthetic
from tests.bench.synthetic import write

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def update():
    spec = importlib.util.spec_from_file_location(
        "update_performance", ROOT / "docs/update_performance.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_that_of_the_records(update):
    assert update.main(["--check"]) == 0


def test_pictures_and_records_exist():
    text = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    assert targets
    for target in targets:
        assert (ROOT / "docs" / target).resolve().exists(), target


def test_every_section_is_filled(update, tmp_path):
    found = records.runs(
        [write(tmp_path / "2026-12-01-h200-abc1234.jsonl", synthetic.everything())]
    )
    text = update.page(found, [Path("roofline.png")])
    assert "1 of 2 met." in text
    assert "| 2.00 x | at least 4 x | missed by 50 % |" in text
    lost = text.index("### Slower")
    assert lost < text.index("### Faster")
    assert "| triton, 133.3 us | eager, 100.0 us | 1.33 (± 0.020) |" in text[lost:]
    assert "### block 512 x 64, m=8, plain, forward+backward, graph-cold" in text
    assert "mmadapt-compile: gate: GateError: y: too large" in text
    assert "32 layers, 8 x 512 tokens, with activation checkpointing" in text
    assert "| pill | 16,384 | 1.250 | 0.833 | 50.00 | 45,088,768 |" in text
    assert "| triton | saved | 132 B a token | 0 B | 0.1 % |" in text
    assert "| adapter | 1 | forward | - | 80 | - | - |" in text
    assert "![roofline](performance/roofline.png)" in text
    assert "triton again" not in text


def test_without_records_it_says_so(update):
    text = update.page([], [])
    assert "No GPU has been measured yet." in text
    assert text.count("Not measured yet.") >= 4
