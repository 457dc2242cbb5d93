"""Measured crossovers: ranges of sizes, records, and backends that need a measurement."""

import json
from pathlib import Path

import pytest
import torch

from mmadapt.ops._backends import _REGISTRY, _crossovers
from mmadapt.ops._backends._crossovers import extent, measured, not_worth_it, parse

ROOT = Path(__file__).resolve().parents[2]
TABLE = {
    "record": "whole.json",
    "entries": [
        {"op": "swiglu_adapter", "backend": "cuda", "dtype": "bfloat16", "min_tokens": 512,
         "dim": [1024, 4096], "rank": [16, 64], "record": "cuda.json"},
        {"op": "swiglu_adapter", "backend": "cuda", "dtype": "bfloat16", "min_tokens": None,
         "rank": [65, 128]},
        {"op": "modality_gate", "backend": "cuda", "dtype": "bfloat16", "min_tokens": 64,
         "dim": [256, 8192]},
    ],
}  # fmt: skip


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(_crossovers, "measured", lambda: parse(TABLE))


def adapter(tokens, dim, rank, dtype=torch.bfloat16):
    """What `unsupported` of the contract gets, without memory."""
    with torch.device("meta"):
        x, gate = torch.empty(tokens, dim, dtype=dtype), torch.empty(2, rank, dim, dtype=dtype)
        return x, gate, gate, gate.mT, None, None


def reason(tokens, dim, rank, dtype=torch.bfloat16):
    return not_worth_it("swiglu_adapter", "cuda", tokens, adapter(tokens, dim, rank, dtype))


def test_from_so_many_tokens_within_its_ranges(table):
    for dim, rank in ((1024, 16), (4096, 64), (2048, 33)):
        assert reason(512, dim, rank) is None
        assert reason(511, dim, rank) == "511 tokens are below its crossover of 512"


def test_cuda_needs_a_measurement(table):
    none = "no measurement says that it pays for torch.bfloat16, dim "
    assert reason(8192, 1023, 16) == f"{none}1023, rank 16"
    assert reason(8192, 4096, 15) == f"{none}4096, rank 15"
    assert reason(8192, 4096, 64, torch.float16).startswith("no measurement")
    value = torch.empty(128, 2, 64, dtype=torch.bfloat16, device="meta")
    assert not_worth_it("modality_gate", "cuda", 128, (value,)) == f"{none}128"
    assert not_worth_it("modality_gate", "cuda", 128, (value.repeat(1, 2, 1),)) is None


def test_a_null_names_the_record(table):
    assert reason(8192, 64, 128) == (
        "in torch.bfloat16 another backend was faster at some measured size (whole.json)"
    )


def test_other_backends_need_none(table):
    assert not_worth_it("swiglu_adapter", "triton", 1, adapter(1, 8, 4)) is None


def test_extent():
    assert extent("swiglu_adapter", adapter(3, 8, 5)) == (8, 5)
    x, factor_in = torch.empty(3, 8), torch.empty(5, 8)
    assert extent("cp_linear", (x, [], [], factor_in)) == (8, 5)
    assert extent("projected_modality_gate", (torch.empty(3, 2, 7), x)) == (14, 0)


def test_the_shipped_file():
    path = Path(_crossovers.__file__).with_name("crossovers.json")
    table = json.loads(path.read_text())
    entries = [e for found in measured().values() for e in found]
    assert len(entries) == len(table["entries"]) > 0
    for op, backend, _ in measured():
        assert backend in _REGISTRY[op]
    for record in {entry.record for entry in entries}:
        assert (ROOT / record).is_file(), record
