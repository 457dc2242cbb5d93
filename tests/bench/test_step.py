"""Whole steps: the record, twins with one loss, failures that cost nobody else a number."""

import shlex

import pytest

from bench import methods, report, step

TINY = shlex.split(
    "--geometry tiny --batch 1 --length 40 --rank 4 --rounds 2 --warmup 1 --device cpu"
)


def rows_of(tmp_path, *arguments):
    code = step.main([*TINY, "--out", str(tmp_path), "--commit", "abc1234", *arguments])
    return code, report.read(next(tmp_path.iterdir()))[1:]


def test_every_method_takes_a_step(tmp_path, capsys):
    code, rows = rows_of(tmp_path)
    assert code == 0
    names = [*methods.METHODS, "pill again"]
    assert [r["method"] for r in rows] == names * 2
    assert [r["checkpointing"] for r in rows] == [False] * 6 + [True] * 6
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(40 / row["seconds"]["p50"])
        assert row["peak_bytes"] is None and row["held_bytes"] > 0
    by_name = {r["method"]: r for r in rows[:6]}
    assert by_name["pill"]["ratio"]["frozen"]["p50"] > 0
    assert by_name["pill"]["trained"] == by_name["pill-eager"]["trained"]
    # Checkpointing changes no number.
    assert [r["loss"] for r in rows[:6]] == pytest.approx([r["loss"] for r in rows[6:]], rel=1e-3)
    out = capsys.readouterr().out
    assert "checkpointing off" in out and "checkpointing on" in out


def test_what_fails_is_left_out(tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("no such weights")

    monkeypatch.setitem(methods.METHODS, "lora", broken)
    code, rows = rows_of(tmp_path, "--methods", "frozen,lora,pill", "--checkpointing", "off")
    assert code == 1
    assert [r["method"] for r in rows] == ["frozen", "lora", "pill", "pill again"]
    assert rows[1]["failed"] == "build: RuntimeError: no such weights"
    assert "seconds" in rows[0] and "lora" not in rows[0]["ratio"]
    assert "FAILED build" in capsys.readouterr().out


def test_another_result_than_its_twins_gets_no_time(tmp_path, monkeypatch):
    pill = methods.METHODS["pill"]

    def other(model, geometry, rank, dtype):
        found = pill(model, geometry, rank, dtype)
        for name, parameter in found.named_parameters():
            if name.endswith("default.up"):
                parameter.data.mul_(3000)
        return found

    monkeypatch.setitem(methods.METHODS, "pill", other)
    code, rows = rows_of(tmp_path, "--methods", "pill-eager,pill", "--checkpointing", "off")
    assert code == 1
    assert rows[1]["failed"].startswith("gate: ")
    assert "seconds" not in rows[1]


def test_unknown_methods_are_refused():
    with pytest.raises(SystemExit, match="nonsense; there are frozen"):
        step.main(["--methods", "nonsense"])
