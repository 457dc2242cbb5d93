"""The correctness gate lets honest results pass and nothing else."""

import pytest
import torch

from bench import gate as gates
from bench.case import BOTH, FORWARD
from bench.gate import Gate, GateError


@pytest.mark.parametrize("kind", [FORWARD, BOTH])
def test_honest_results_pass(case, kind):
    gate = Gate(case)
    for provider in ("eager", "eager-packed", "reference"):
        errors = gate.check(case.make(provider, kind)(0), kind)
        assert list(errors) == case.result_names(kind)
        assert all(0 < e < 0.05 for e in errors.values())


@pytest.mark.parametrize("index", range(6))
def test_one_wrong_tensor_is_named(case, index):
    gate = Gate(case)
    results = case.make("eager", BOTH)(0)
    results[index] = results[index] * 1.05
    with pytest.raises(GateError, match=f"^{case.result_names(BOTH)[index]}:"):
        gate.check(results, BOTH)


def test_one_wrong_entry_is_found(case):
    """Invisible in the root mean square of many entries."""
    gate = Gate(case)
    results = case.make("eager", BOTH)(0)
    gate.eager["y"] = gates.Error(rms=1.0, largest=gate.eager["y"].largest)
    results[0][3, 5] += 0.2
    with pytest.raises(GateError, match="y: largest error"):
        gate.check(results, BOTH)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: r[:-1], "returned 5 tensors"),
        (lambda r: [*r[:-1], None], "is None"),
        (lambda r: [r[0][:-1], *r[1:]], "has shape"),
        (lambda r: [r[0].index_fill(0, torch.tensor([1]), float("nan")), *r[1:]], "not finite"),
    ],
)
def test_unusable_results_are_refused(case, damage, message):
    with pytest.raises(GateError, match=message):
        Gate(case).check(damage(case.make("eager", BOTH)(0)), BOTH)


def test_chunks_of_rows_add_up(case, monkeypatch):
    whole = gates.exact_results(case)
    monkeypatch.setattr(gates, "CHUNK_ELEMENTS", 7 * 16)
    for a, b in zip(gates.exact_results(case), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
