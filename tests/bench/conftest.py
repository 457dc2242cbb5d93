"""Small cases and a machine record, so that the harness runs on a CPU in seconds."""

import pytest
import torch

from bench.cases import adapter

SMALL = (48, 16, 8)
CPU = torch.device("cpu")


@pytest.fixture
def machine():
    return {
        "kind": "run",
        "gpu": None,
        "name": "cpu",
        "l2_bytes": 1000,
        "commit": "abc1234",
        "dirty": False,
        "torch": torch.__version__,
        "triton": None,
        "ceilings": {"bytes_per_s": 1e10, "flops_per_s": 1e11},
    }


@pytest.fixture
def case():
    """A small adapter without the providers that are slow to start here."""
    found = adapter.build(SMALL, "norm", torch.bfloat16, CPU)
    for name in ("compile", "compile-max", "triton"):
        del found.providers[name]
    return found
