"""The table and page of a comparison."""

import pytest

from mmadapt.eval import Comparison, MethodRow, comparison_table, write_comparison


def comparison(**changes):
    rows = [
        MethodRow("random order", {"R@1": 2.5}),
        MethodRow(
            "<b>aurora</b>",
            {"R@1": 61.25},
            trainable=1200,
            seconds=75.2,
            saved_mib=3.25,
            state_mib=0.5,
            steps=4,
            loss=[(1, 2.0), (4, 1.0)],
        ),
    ]
    values = {
        "title": "t",
        "task": "retrieval",
        "columns": ["R@1"],
        "rows": rows,
        "parameters": 60_000,
        "seed": 0,
        "model": "m",
        "data": "d",
        "device": "CPU",
        "versions": {"torch": "2"},
    }
    return Comparison(**(values | changes))


def test_table():
    head, rows = comparison_table(comparison())
    assert head == ["method", "trained", "share", "R@1", "time", "saved", "state"]
    assert rows[0] == ["random order", "–", "–", "2.5", "–", "–", "–"]
    assert rows[1][1:] == ["1,200", "2.00 %", "61.2", "1 min 15 s", "3.2 MiB", "0.5 MiB"]


def test_round_trip_and_page(tmp_path):
    found = comparison()
    page = write_comparison(tmp_path / "run", found)
    text = (tmp_path / "run" / "metrics.json").read_text()
    assert Comparison.from_json(text) == found
    html = page.read_text()
    assert "&lt;b&gt;aurora&lt;/b&gt;" in html and "<b>aurora" not in html
    assert html.count("<polyline") == 1


def test_a_page_without_training(tmp_path):
    rows = [MethodRow("random order", {"R@1": 2.5})]
    page = write_comparison(tmp_path, comparison(rows=rows))
    assert "No method was trained" in page.read_text()


def test_other_schemas_are_refused():
    with pytest.raises(ValueError, match="schema: got 9, expected 1"):
        Comparison.from_json(comparison(schema=9).to_json())
