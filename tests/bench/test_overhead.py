"""Host time of calls: all levels compute the same; the baseline knows every one."""

import pytest
import torch

from bench import overhead, report
from bench.case import BOTH, FORWARD
from tests.bench.conftest import CPU

QUICK = {"levels": ("eager", "op", "module"), "rounds": 2, "times": 1}


@pytest.mark.parametrize("contract", overhead.CONTRACTS)
@pytest.mark.parametrize("kind", [FORWARD, BOTH])
def test_every_level_runs_and_agrees(contract, kind):
    rows = overhead.measure(contract, 64, kind, torch.float32, CPU, **QUICK)
    assert [r["level"] for r in rows] == ["eager", "op", "module"]
    for row in rows:
        assert "failed" not in row, row
        assert row["us"]["p50"] > 0


def test_a_wrong_level_is_found(monkeypatch):
    eager = overhead.adapter.eager
    monkeypatch.setattr(overhead.adapter, "eager", lambda *t: 1.01 * eager(*t))
    rows = overhead.measure("adapter", 64, FORWARD, torch.float32, CPU, **QUICK)
    assert ["failed" in row for row in rows] == [False, True, True]
    assert "differs from eager" in rows[1]["failed"]


def test_the_baseline_holds_every_level():
    known = overhead.baseline()
    for contract in overhead.CONTRACTS:
        for tokens in overhead.TOKENS:
            for kind in (FORWARD, BOTH):
                for level in QUICK["levels"]:
                    row = {"contract": contract, "tokens": tokens, "pass": kind, "level": level}
                    assert known[overhead.key(row)]["over_eager"] > 0


def test_the_command_writes_its_record(tmp_path, capsys):
    arguments = f"--contracts gate --no-compile --rounds 2 --device cpu --out {tmp_path} --commit a"
    assert overhead.main(arguments.split()) == 0
    _, *rows = report.read(next(tmp_path.iterdir()))
    assert len(rows) == 2 * 2 * 3
    assert "gate, T=64, forward" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="nothing; there are"):
        overhead.main(["--contracts", "nothing"])
