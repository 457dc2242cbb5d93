"""Gain, forgetting and drift of one more task."""

import math

import pytest
import torch

from mmadapt.eval import Accuracy, Drift, RunInfo, RunResults, Transfer, answer_drift, format_tables


def transfer(**options):
    source = {
        "digits": (Accuracy(90, 100), Accuracy(60, 100)),
        "sums": (Accuracy(70, 100), Accuracy(80, 100)),
    }
    return Transfer(target=(Accuracy(20, 100), Accuracy(90, 100)), source=source, **options)


def test_scores():
    """A_S 0.80 -> 0.70, A_T 0.20 -> 0.90."""
    found = transfer()
    assert found.source_score(after=False) == pytest.approx(0.8)
    assert found.source_score() == pytest.approx(0.7)
    assert (found.target_score, found.gain) == (pytest.approx(0.9), pytest.approx(0.7))
    assert found.forgetting == pytest.approx(-0.1)
    assert found.worst_forgetting == pytest.approx(-0.3)
    assert found.overall == pytest.approx(0.6)
    assert found.harmonic_mean == pytest.approx(2 * 0.7 * 0.9 / 1.6)
    assert found.retention == pytest.approx(0.875)


def test_results_carry_it_and_the_report_shows_it():
    found = transfer(drift=Drift(0.5, 0.75, 0.1), restored={"digits": Accuracy(90, 100)})
    results = RunResults(RunInfo("run", 0), transfer=found)
    assert RunResults.from_json(results.to_json()) == results
    (table,) = format_tables(results)
    assert table.key == "transfer" and "F = -0.100 (worst -0.300)" in table.title
    assert [row[0] for row in table.rows] == ["new task", "digits", "sums", "nats per answer token"]
    assert all(len(row) == len(table.columns) for row in table.rows)
    assert table.rows[1][3].startswith("90.0") and table.rows[2][3] == "–"


class Model(torch.nn.Module):
    """Logits that do not depend on the input."""

    def __init__(self):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(3))

    def forward(self, input_ids):
        shape = (*input_ids.shape, 3)
        return type("Output", (), {"logits": self.logits.expand(shape)})()


class Collator:
    encoder = type("Encoder", (), {"image_token_id": 9})()

    def __call__(self, samples):
        ids = torch.zeros(len(samples), 4, dtype=torch.int64)
        labels = torch.tensor([[-100, -100, 0, 1]]).expand(len(samples), -1)
        return {"input_ids": ids, "labels": labels}


class Sample:
    messages = ()


def test_drift():
    model = Model()
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.5, 0.25])

    def put(values):
        model.logits.data.copy_(values.log() + 2)

    found = answer_drift(
        model, Collator(), [Sample()] * 5, lambda: put(p), lambda: put(q), batch_size=2
    )
    # both distributions give the labels 0 and 1 the probabilities 1/2 and 1/4
    mean = (math.log(2) + math.log(4)) / 2
    assert found.before == pytest.approx(mean) and found.after == pytest.approx(mean)
    assert found.loss_delta == pytest.approx(0)
    assert found.divergence == pytest.approx(0.25 * math.log(2))
    torch.testing.assert_close(model.logits.data, q.log() + 2)
