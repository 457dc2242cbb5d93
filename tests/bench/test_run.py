"""The command line, the records it writes, the tables it prints, and the goals' verdicts."""

import argparse
import dataclasses
import math

import pytest
import torch

from bench import goals, machine, report, run
from bench.case import BOTH, FORWARD, Provider
from bench.cases import adapter
from bench.measure import Settings, measure
from tests.bench.conftest import CPU

QUICK = Settings(mode="eager-call", rounds=2, warmup_seconds=0.0)


def test_shapes():
    assert run.shapes("8192x4096x32,2x3x4") == [(8192, 4096, 32), (2, 3, 4)]
    assert run.shapes("2x3x4x5") == [(2, 3, 4, 5)]
    for text in ("8192x4096", "1x2x0", "1x2x3x4x5", "1x2xa"):
        with pytest.raises(argparse.ArgumentTypeError):
            run.shapes(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["adapter", "--device", "cpu", "--mode", "graph-cold"], "graph-cold needs a GPU"),
        (["adapter", "--device", "cpu", "--passes", "sideways"], "expected forward"),
        (["adapter", "--device", "cpu", "--variants", "plain,single"], "'single' is none of"),
        (["adapter", "--device", "cpu", "--grid", "huge"], "bench.cases.adapter has default"),
        (["adapter", "--device", "cpu", "--shapes", "1x2x3x4"], "takes 3 numbers"),
    ],
)
def test_what_cannot_run_is_said(arguments, message):
    with pytest.raises(SystemExit, match=message):
        run.main(arguments)


def test_a_run_writes_its_record(tmp_path, capsys):
    code = run.main(
        "adapter --shapes 32x16x4 --variants plain --providers eager --no-compile --device cpu "
        "--rounds 2 --warmup-ms 0 "
        f"--out {tmp_path} --commit abc1234-dirty".split()
    )
    assert code == 0
    (path,) = tmp_path.iterdir()
    assert path.name.endswith("-cpu-abc1234-dirty.jsonl")
    first, *rows = report.read(path)
    assert first["kind"] == "run"
    assert (first["commit"], first["dirty"]) == ("abc1234", True)
    assert {"torch", "triton", "cuda", "ceilings", "l2_bytes"} <= first.keys()
    assert [(r["pass"], r["provider"]) for r in rows] == [
        (kind, name) for kind in (FORWARD, BOTH) for name in ("copy", "eager", "eager again")
    ]
    eager = rows[1]
    assert eager["ms"]["p20"] <= eager["ms"]["p50"] <= eager["ms"]["p80"]
    assert eager["ratio"]["copy"]["p50"] > 0
    assert eager["rotated"] == ["x"]
    assert rows[4]["rotated"] == ["x", "dy"]
    assert eager["aa_spread"] >= 0
    assert 0 < eager["error"] < 0.05
    out = capsys.readouterr().out
    assert "32 x 16, m=4, plain" in out
    assert str(path) in out


def test_a_case_that_breaks_is_recorded_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    arguments = (
        "adapter --shapes 8x16x4,16x16x4 --variants plain --providers eager --device cpu --rounds 2"
        f" --warmup-ms 0 --passes forward --out {tmp_path} --commit abc1234"
    ).split()
    build, built = adapter.build, []

    def breaks_once(*shape_and_rest):
        built.append(shape_and_rest)
        if len(built) == 1:
            raise torch.OutOfMemoryError("too large")
        return build(*shape_and_rest)

    monkeypatch.setattr(adapter, "build", breaks_once)
    assert run.main(arguments) == 1
    _, broken, *rows = report.read(next(tmp_path.iterdir()))
    assert "OutOfMemoryError: too large" in broken["failed"]
    assert [row["provider"] for row in rows] == ["copy", "eager", "eager again"]
    assert "FAILED OutOfMemoryError" in capsys.readouterr().out


def test_a_budget_leaves_cases_out_and_says_so(tmp_path):
    arguments = (
        "adapter --shapes 8x16x4,16x16x4 --variants plain --providers eager --device cpu --rounds 2"
        f" --warmup-ms 0 --passes forward --budget-s 0 --out {tmp_path} --commit abc1234"
    ).split()
    assert run.main(arguments) == 0
    assert report.read(next(tmp_path.iterdir()))[1]["left_out"] == 2


def test_optional_providers_run_only_when_asked_for(case, machine):
    case.providers["slow"] = dataclasses.replace(case.providers["eager"], optional=True)

    def ran(**settings):
        rows = measure(case, machine, dataclasses.replace(QUICK, kinds=(FORWARD,), **settings))
        return "slow" in {row["provider"] for row in rows}

    assert not ran()
    assert ran(extra=("slow",))
    assert ran(providers=("slow",))


def test_commit_is_unknown_without_git(tmp_path, monkeypatch):
    monkeypatch.delenv(machine.COMMIT_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = machine.describe(CPU, None)
    assert (found["commit"], found["dirty"]) == ("unknown", None)
    monkeypatch.setenv(machine.COMMIT_VARIABLE, "fed4321")
    assert machine.describe(CPU, None)["commit"] == "fed4321"


def test_slug():
    assert machine.slug("NVIDIA H200") == "h200"
    assert machine.slug("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"


def test_a_wrong_or_missing_provider_gets_no_time(case, machine):
    eager = case.providers["eager"].function
    case.providers["wrong"] = Provider(lambda **t: eager(**t) * 1.1)
    case.providers["broken"] = Provider(lambda **t: 1 / 0)
    case.providers["missing"] = Provider(eager, skip="not installed")
    rows = {r["provider"]: r for r in measure(case, machine, QUICK) if r["pass"] == FORWARD}
    assert "gate: GateError: y:" in rows["wrong"]["failed"]
    assert "ZeroDivisionError" in rows["broken"]["failed"]
    assert rows["missing"]["skipped"] == "not installed"
    for name in ("wrong", "broken", "missing"):
        assert not {"ms", "ratio"} & rows[name].keys()
        assert name not in rows["eager"]["ratio"]
    text = report.table(rows.values())
    assert "FAILED gate: GateError: y:" in text
    assert "skipped (not installed)" in text


def test_a_constraint_of_a_backend_is_no_failure(case, machine):
    from mmadapt.ops import BackendError

    def refuse(**tensors):
        raise BackendError("rank too large")

    case.providers["refused"] = Provider(refuse)
    rows = {r["provider"]: r for r in measure(case, machine, QUICK)}
    assert rows["refused"]["skipped"] == "rank too large"


def timed(ours=1.0, **others):
    """Rows as `measure` returns them: milliseconds of Triton and of the others."""
    times = {goals.OURS: ours, **others}
    return [
        {
            "provider": name,
            "pass": FORWARD,
            "ms": {"p50": ms},
            "limit_ms": 0.5,
            "aa_spread": 0.01,
            "saved_bytes": 480,
            "ratio": {n: {"p50": ms / other} for n, other in times.items() if n != name},
        }
        for name, ms in times.items()
    ]


@pytest.mark.parametrize(
    ("measured", "rows", "value", "met"),
    [
        (goals.over("copy"), timed(1.5, copy=1.0), 1.5, True),
        (goals.over("copy"), timed(2.5, copy=1.0), 2.5, False),
        (goals.over("where", "compile"), timed(1.0, where=2.0, compile=0.8), 1.25, True),
        (goals.over("where", "compile"), timed(1.0, where=2.0), None, None),
        (goals.over_limit, timed(1.0), 2.0, True),
        (goals.microseconds, timed(0.001), 1.0, True),
        (goals.saved_per_token, timed(), 10.0, False),
        (goals.over("copy"), [], None, None),
    ],
)
def test_verdicts(case, measured, rows, value, met):
    goal = goals.Goal("some goal", FORWARD, 2.0, measured)
    found = goals.result(goal, case, rows, "graph-cold")
    assert found["measured"] == (None if value is None else pytest.approx(value))
    assert found["met"] is met
    assert (found["why"] is None) == (value is not None)
    assert "some goal" in goals.goal_table([found])


def test_speedups_are_at_least(case):
    goal = goals.Goal("", FORWARD, 7.0, goals.speedup_over("where", "compile"), at_least=True)
    fast, slow = (
        goals.result(goal, case, timed(1.0, where=20.0, compile=c), "") for c in (8.0, 6.0)
    )
    assert math.isclose(fast["measured"], 8.0)
    assert fast["met"] and not slow["met"]


def test_goals_run_end_to_end(tmp_path, machine, monkeypatch):
    first = goals.PROBLEMS[0]
    problem = dataclasses.replace(
        first,
        shape=(32, 16, 4),
        providers=("copy", "eager", "reference"),
        goals=tuple(goal for goal in first.goals if goal.provider != goals.CUDA),  # needs a GPU
    )
    record = report.Record(tmp_path, machine)
    # Here the Triton kernels are interpreted: slow, and no measure.
    monkeypatch.setattr(goals, "OURS", "reference")
    assert not goals.run(machine, QUICK, record, CPU, (problem,))
    found = [r for r in report.read(record.path) if r["kind"] == "goal"]
    assert [g["goal"] for g in found] == [g.text for g in problem.goals]
    assert all(g["measured"] is not None for g in found)
