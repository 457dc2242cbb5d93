"""Pictures: one of each kind that the records allow, and the same file from the same records."""

import pytest

from bench import plot, records
from tests.bench import synthetic
from tests.bench.synthetic import case, run, write


def test_every_kind_is_drawn(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", synthetic.everything())
    assert plot.main([str(path), "--out", str(tmp_path / "png")]) == 0
    names = {p.stem for p in (tmp_path / "png").iterdir()}
    assert names == {
        "tokens-adapter-64-8-plain-bfloat16-graph-cold",
        "roofline-h200",
        "block-512-x-64-m-8-plain-bfloat16-graph-cold",
        "heat-adapter-plain-512-bfloat16-forward-graph-cold",
        "step-llama-7b-32-8-512-32-bf16",
        "growth-tokens-4096-32-bf16",
    }
    assert len(capsys.readouterr().out.splitlines()) == len(names)


def test_the_same_records_draw_the_same_files(tmp_path):
    found = records.runs([write(tmp_path / "a.jsonl", synthetic.everything()[:25])])
    first, second = (plot.draw(found, tmp_path / name) for name in ("x", "y"))
    assert first
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes()


def test_the_floor_and_the_times_are_those_of_the_record(tmp_path):
    found = records.runs([write(tmp_path / "a.jsonl", synthetic.everything())])
    figure = dict(plot.figures(found))["tokens-adapter-64-8-plain-bfloat16-graph-cold"]
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert list(lines["triton"].get_xdata()) == [512, 2048, 8192]
    assert list(lines["triton"].get_ydata()) == [0.03, 0.05, 0.1]
    assert list(lines["floor"].get_ydata()) == [0.01] * 3
    assert "triton again" not in lines


def test_heat_is_the_speed_up(tmp_path):
    found = records.runs([write(tmp_path / "a.jsonl", synthetic.everything())])
    figure = dict(plot.figures(found))["heat-adapter-plain-512-bfloat16-forward-graph-cold"]
    texts = [t.get_text() for t in figure.axes[0].texts]
    assert texts == ["1.50", "0.75", "2.00", "1.50", "0.75"]  # d=64 was measured at m=8 alone


def test_nothing_to_draw(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [run(), *case({"eager": None})])
    assert plot.main([str(path), "--out", str(tmp_path / "png")]) == 1
    assert "nothing in these records" in capsys.readouterr().out


@pytest.mark.parametrize(("value", "text"), [(12345.6, "12,346"), (0.1234, "0.123")])
def test_numbers(value, text):
    assert plot._number(value) == text
