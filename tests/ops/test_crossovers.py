"""Measured crossovers: ranges of sizes, records, and backends that need a measurement."""

import json
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mmadapt.ops._backends import _REGISTRY, _crossovers
from mmadapt.ops._backends._crossovers import Extent, extent, measured, not_worth_it, parse

ROOT = Path(__file__).resolve().parents[2]
TABLE = {
    "record": "whole.json",
    "entries": [
        {"op": "swiglu_adapter", "backend": "cuda", "dtype": "bfloat16", "min_tokens": 512,
         "dim": [1024, 4096], "rank": [16, 64], "record": "cuda.json"},
        {"op": "swiglu_adapter", "backend": "cuda", "dtype": "bfloat16", "min_tokens": None,
         "rank": [65, 128]},
        {"op": "swiglu_adapter", "backend": "cuda", "dtype": "float16", "min_tokens": 8,
         "experts": [2, 4]},
        {"op": "swiglu_adapter", "backend": "cuda", "dtype": "float16", "min_tokens": 16,
         "norm": False},
        {"op": "modality_gate", "backend": "cuda", "dtype": "bfloat16", "min_tokens": 64,
         "dim": [256, 8192]},
    ],
}  # fmt: skip


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(_crossovers, "measured", lambda: parse(TABLE))


def adapter(tokens, dim, rank, dtype=torch.bfloat16, experts=2, norm=False):
    """What `unsupported` of the contract gets, without memory."""
    with torch.device("meta"):
        x = torch.empty(tokens, dim, dtype=dtype)
        gate = torch.empty(experts, rank, dim, dtype=dtype)
        return x, gate, gate, gate.mT, None, x[0] if norm else None


def reason(tokens, *sizes, **options):
    return not_worth_it("swiglu_adapter", "cuda", tokens, adapter(tokens, *sizes, **options))


def test_from_so_many_tokens_within_its_ranges(table):
    for dim, rank in ((1024, 16), (4096, 64), (2048, 33)):
        assert reason(512, dim, rank) is None
        assert reason(511, dim, rank) == "511 tokens are below its crossover of 512"


def test_cuda_needs_a_measurement(table):
    none = "no measurement says that it pays for torch.bfloat16, dim "
    assert reason(8192, 1023, 16, experts=1) == f"{none}1023, rank 16"
    assert reason(8192, 4096, 15) == f"{none}4096, rank 15, 2 experts"
    assert reason(8192, 4096, 64, torch.float32).startswith("no measurement")
    value = torch.empty(128, 2, 64, dtype=torch.bfloat16, device="meta")
    assert not_worth_it("modality_gate", "cuda", 128, (value,)) == f"{none}128"
    assert not_worth_it("modality_gate", "cuda", 128, (value.repeat(1, 2, 1),)) is None


@pytest.mark.parametrize(
    ("experts", "norm", "least"),
    [(1, False, 16), (1, True, None), (2, True, 8), (4, False, 8), (5, False, 16), (5, True, None)],
)
def test_by_experts_and_norm(table, experts, norm, least):
    sizes = {"dtype": torch.float16, "experts": experts, "norm": norm}
    if least is None:
        assert str(reason(64, 64, 8, **sizes)).endswith("behind a norm")
    else:
        assert reason(least, 64, 8, **sizes) is None
        assert reason(least - 1, 64, 8, **sizes) is not None


@pytest.mark.parametrize("lacks", [None, "compute capability 8.0, needs 9.0"])
def test_cuda_only_with_the_kernels_that_were_measured(table, monkeypatch, lacks):
    monkeypatch.setattr(_crossovers, "_not_as_measured", lambda device: lacks)
    with FakeTensorMode():
        x = torch.empty(512, 1024, dtype=torch.bfloat16, device="cuda")
        gate = torch.empty(2, 16, 1024, dtype=torch.bfloat16, device="cuda")
        said = not_worth_it("swiglu_adapter", "cuda", 512, (x, gate, gate, gate.mT, None, None))
    assert said == (lacks and f"only its kernels for sm_90a were measured: {lacks}")


def test_a_null_names_the_record(table):
    assert reason(8192, 64, 128) == (
        "in torch.bfloat16 another backend was faster at some measured size (whole.json)"
    )


def test_other_backends_need_none(table):
    assert not_worth_it("swiglu_adapter", "triton", 1, adapter(1, 8, 4)) is None


def test_extent():
    assert extent("swiglu_adapter", adapter(3, 8, 5)) == Extent(8, 5, experts=2)
    found = extent("swiglu_adapter", adapter(3, 8, 5, experts=1, norm=True))
    assert found == Extent(8, 5, norm=True)
    x, *rest = adapter(3, 8, 5)
    assert extent("swiglu_adapter", (x.half(), *rest)) == Extent(8, 5, experts=2, wide=True)
    x, factor_in, factor_out = torch.empty(3, 8), torch.empty(5, 8), torch.empty(7, 5)
    vector, matrix = torch.empty(5), torch.empty(5, 5)
    for modes, dense in (([vector], False), ([vector, matrix], True)):
        found = extent("cp_linear", (x, [], [], factor_in, factor_out, modes))
        assert found == Extent(8, 5, 7, dense=dense)
    found = extent("cp_linear", (x.half(), [], [], factor_in, factor_out, [matrix]))
    assert str(found) == "dim 8, dim_out 7, rank 5, mode matrices, fp32 weights"
    assert extent("projected_modality_gate", (torch.empty(3, 2, 7), x)) == Extent(14, 0)


def test_the_shipped_file():
    path = Path(_crossovers.__file__).with_name("crossovers.json")
    table = json.loads(path.read_text())
    entries = [e for found in measured().values() for e in found]
    assert len(entries) == len(table["entries"]) > 0
    for op, backend, _ in measured():
        assert backend in _REGISTRY[op]
    for record in {entry.record for entry in entries}:
        assert (ROOT / record).is_file(), record
