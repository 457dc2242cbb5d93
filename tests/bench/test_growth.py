"""Lines through measurements, and the sweeps that they are fitted to."""

import shlex

import pytest
import torch

from bench import fit, growth, report
from bench.cases import routed
from bench.gate import GateError
from tests.bench.conftest import CPU

SMALL = shlex.split("--dim 16 --rank 4 --least 64 --most 256 --tokens 64 --rounds 2 --device cpu")


def test_a_line_is_found():
    x = [512, 4096, 524288]
    found = fit.line(x, [3 + 0.5 * v for v in x])
    assert (found.intercept, found.slope) == pytest.approx((3, 0.5))
    assert found.deviation < 1e-9
    bent = fit.line(x, [3 + 0.5 * v**1.2 for v in x])
    assert bent.deviation > 0.1
    for bad in (([1, 1], [1, 2]), ([1, 2], [1, 0])):
        with pytest.raises(ValueError, match=r"needs two|positive"):
            fit.line(*bad)


def test_what_is_saved_grows_with_tokens_and_layers(tmp_path, capsys):
    assert growth.main([*SMALL, "--out", str(tmp_path), "--commit", "abc1234"]) == 0
    _, *rows = report.read(next(tmp_path.iterdir()))
    assert {r["kind"] for r in rows} == {"growth", "fit"}
    saved = {
        (r["over"], r["provider"]): r
        for r in rows
        if r["kind"] == "fit" and r["quantity"] == "saved_bytes"
    }
    # Pre-activations in bf16, 4 m bytes a token; the norm's statistics in fp32.
    ours = saved["tokens", "cpu"]
    assert ours["slope"] == pytest.approx(4 * 4 + 4)
    assert ours["max_deviation"] < 1e-6
    assert saved["tokens", "where"]["slope"] > 3 * ours["slope"]
    # Each further layer also keeps its input, 16 bf16 values a token.
    assert saved["layers", "mmadapt"]["slope"] == pytest.approx(64 * (4 * 4 + 4 + 2 * 16), rel=0.01)
    assert "B a token" in capsys.readouterr().out


def test_rows_are_checked():
    case = routed.build((64, 16, 4), growth.VARIANT, torch.bfloat16, CPU)
    growth.check_rows(case, "reference")
    where = case.providers["where"].function
    wrong = type(case.providers["where"])(lambda **t: where(**t) * 1.05)
    case.providers["wrong"] = wrong
    with pytest.raises(GateError, match=r"^y: error"):
        growth.check_rows(case, "wrong")


def test_a_provider_stops_where_memory_ends(monkeypatch):
    def ends(case, name, mode, rounds):
        if name == "where" and case.tokens > 64:
            raise torch.OutOfMemoryError("none left")
        return {"ms": 1.0, "saved_bytes": 1, "peak_bytes": None}

    monkeypatch.setattr(growth, "_of_case", ends)
    rows = list(growth.tokens(growth.parser().parse_args(SMALL), CPU, "eager-call", 0))
    assert [(r["value"], r["provider"]) for r in rows if "ended" in r] == [(128, "where")]
    assert [r["value"] for r in rows if r["provider"] == "where"] == [64, 128]
    assert [r["value"] for r in rows if r["provider"] == "cpu"] == [64, 128, 256]


def test_the_sweep_ends_where_the_inputs_do_not_fit(monkeypatch):
    build = routed.build

    def ends(shape, *rest):
        if shape[0] > 64:
            raise torch.OutOfMemoryError("none left")
        return build(shape, *rest)

    monkeypatch.setattr(routed, "build", ends)
    arguments = growth.parser().parse_args([*SMALL, "--providers", "where"])
    rows = list(growth.tokens(arguments, CPU, "eager-call", 0))
    assert [r["value"] for r in rows] == [64, 128]
    assert "out of memory" in growth.text(rows[1])
    assert growth.fitted(rows) == []
