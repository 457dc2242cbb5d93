"""metrics.json: nothing is lost on the way, and nothing unknown is let in."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from mmadapt.eval import Ablation, AblationRow, Accuracy, RunInfo, RunResults, StageCurve


def test_round_trip(run_results):
    text = run_results.to_json()
    assert RunResults.from_json(text) == run_results
    assert RunResults.from_json(run_results.to_json(indent=None)) == run_results


def test_minimal_round_trip():
    results = RunResults(info=RunInfo("empty", seed=0))
    assert RunResults.from_json(results.to_json()) == results


def test_a_diverged_run_is_still_strict_json():
    points = [(1, math.inf), (2, math.nan), (3, -math.inf)]
    results = RunResults(RunInfo("x", 0), stages=[StageCurve("align", points)])

    def refuse(constant):
        raise AssertionError(constant)

    json.loads(results.to_json(), parse_constant=refuse)
    losses = [loss for _, loss in RunResults.from_json(results.to_json()).stages[0].points]
    assert losses[0] == math.inf
    assert math.isnan(losses[1])
    assert losses[2] == -math.inf


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.update(extra=1), r"RunResults: got unknown keys \['extra'\]"),
        (lambda d: d["info"].pop("title"), r"RunResults.info: missing keys \['title'\]"),
        (lambda d: d["info"].update(seed="1"), "RunResults.info.seed: got '1', expected int"),
        (lambda d: d["info"].update(seed=True), "RunResults.info.seed: got True"),
        (lambda d: d["rows"][1].update(name=3), r"RunResults.rows\[1\].name: got 3, expected str"),
        (lambda d: d["gate"].update(mean_abs=["x"]), r"gate.mean_abs\[0\]: got 'x'"),
        (lambda d: d["stages"][0]["points"].append([1]), r"points\[120\]: got 1 items, expected 2"),
        (lambda d: d.update(schema_version=99), "schema_version: got 99, expected 1"),
    ],
)
def test_wrong_files_are_refused_with_their_path(run_results, edit, message):
    data = json.loads(run_results.to_json())
    edit(data)
    with pytest.raises(ValueError, match=message):
        RunResults.from_json(json.dumps(data))


def test_every_field_is_written(run_results):
    data = json.loads(run_results.to_json())
    assert set(data) == {field.name for field in dataclasses.fields(RunResults)}


def test_accuracy():
    assert Accuracy(1, 8).percent == 12.5
    low, high = Accuracy(1, 8).interval
    assert 0 < low < 12.5 < high < 100
    assert math.isnan(Accuracy(0, 0).percent)
    assert all(math.isnan(bound) for bound in Accuracy(0, 0).interval)
    with pytest.raises(ValueError, match="correct=3, total=2"):
        Accuracy(3, 2)


def test_ablation_rows_hold_every_seed():
    row = AblationRow("PILL", {"visual": [90.0, 92.0]})
    assert row.mean("visual") == 91
    with pytest.raises(ValueError, match=r"row 'PILL' has \{'visual': 2\} values"):
        Ablation(["visual"], [0, 1, 2], [row])
    with pytest.raises(ValueError, match="'text': 0"):
        Ablation(["visual", "text"], [0, 1], [row])
