"""Records are read, the newest measurement counts, comparisons are fair."""

import pytest

from bench import records
from bench.case import FORWARD
from tests.bench import synthetic
from tests.bench.synthetic import case, goal, run, write


def test_the_newest_measurement_replaces_the_older_as_a_whole(tmp_path):
    old = [run("2026-12-01"), *case({"eager": 1.0, "triton": 0.5, "manual": 0.7})]
    new = [run("2026-12-02"), *case({"eager": 1.0, "triton": 0.4})]
    other = [run("2026-12-03"), *case({"eager": 3.0}, tokens=1024)]
    paths = [write(tmp_path / "b.jsonl", new + other), write(tmp_path / "a.jsonl", old)]
    groups = {g["shape"]["tokens"]: g for g in records.cases(records.runs(paths))}
    assert groups.keys() == {512, 1024}
    assert list(groups[512].by()) == ["eager", "triton"]
    assert groups[512].by()["triton"]["ms"]["p50"] == 0.4
    assert groups[512].run.path.name == "b.jsonl"


def test_a_goal_keeps_its_last_measured_value(tmp_path):
    rows = [run("2026-12-01"), goal(1.9), run("2026-12-02"), goal(1.7), run("2026-12-03")]
    path = write(tmp_path / "a.jsonl", [*rows, goal(None), goal(None, goal="never")])
    found = {g["goal"]: g["measured"] for g in records.goals(records.runs([path]))}
    assert found == {"forward, over a copy of x": 1.7, "never": None}


def test_rows_without_a_run_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [goal(1.0)])
    with pytest.raises(ValueError, match="line 1: a row before the run's own"):
        records.runs([path])


def compared(tmp_path, **times):
    times = {name.replace("_", "-"): ms for name, ms in times.items()}
    path = write(tmp_path / "a.jsonl", [run(), *case(times)])
    (group,) = records.cases(records.runs([path]))
    return records.compare(group)


@pytest.mark.parametrize(
    ("ours", "verdict"), [(0.8, "win"), (0.99, "equal"), (1.01, "equal"), (1.2, "loss")]
)
def test_verdicts_need_more_than_equal_code_differs_by(tmp_path, ours, verdict):
    found = compared(tmp_path, eager=2.0, manual=1.0, triton=ours, cuda=None, copy=0.1)
    assert (found.ours, found.theirs) == ("triton", "manual")
    assert found.ratio == pytest.approx(ours)
    assert found.verdict == verdict


def test_yardsticks_and_the_reference_are_no_rivals(tmp_path):
    assert compared(tmp_path, copy=0.1, frozen_gemm=0.2, peft_lora=0.3, triton=1.0) is None
    assert compared(tmp_path, eager=1.0, reference=2.0) is None
    assert compared(tmp_path, where=1.0, triton_inplace=0.5).ours == "triton-inplace"


def test_runs_on_a_cpu_are_told_apart(tmp_path):
    path = write(tmp_path / "a.jsonl", [run(gpu=None), run("2026-12-02"), *case({"eager": 1.0})])
    found = records.runs([path])
    assert len(found) == 2 and len(records.on_gpu(found)) == 1
    assert records.on_gpu(found)[0].rows[0]["pass"] == FORWARD


def test_every_key_finds_its_rows(tmp_path):
    found = records.runs([write(tmp_path / "a.jsonl", synthetic.everything())])
    for kind, key, groups in (
        ("step", records.step_key, 2),
        ("growth", records.growth_key, 1),
        ("overhead", records.overhead_key, 1),
        ("goal", records.goal_key, 2),
    ):
        assert len(records.newest(found, kind, key)) == groups
