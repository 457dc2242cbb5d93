"""Host time of a call on the CPU against the committed baseline: `pytest bench/test_overhead.py`.

Times depend on the machine; what is held against the baseline is each level's ratio to eager torch,
measured in turn, best round against best round. It is renewed by
`python -m bench.overhead --device cpu --no-compile --rounds 60 --write-baseline`.
"""

import pytest
import torch

from bench import overhead
from bench.case import BOTH, FORWARD
from bench.overhead import CONTRACTS, TOKENS

CPU = torch.device("cpu")
MARGIN = 1.5
"""Above what the ratio of equal code differs by between quiet and busy machines."""
ROUNDS, CALLS = 60, 5
"""Short rounds: some of them are undisturbed."""


@pytest.mark.parametrize("kind", (FORWARD, BOTH))
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("contract", CONTRACTS)
@pytest.mark.parametrize("level", ("eager", "op", "module"))
def test_time(benchmark, level, contract, tokens, kind):
    call = overhead.calls(contract, tokens, kind, torch.float32, CPU)[level]
    benchmark.group = f"overhead {contract} T={tokens} {kind}"
    benchmark.pedantic(call, rounds=20, iterations=10, warmup_rounds=2)


@pytest.mark.parametrize("kind", (FORWARD, BOTH))
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("contract", CONTRACTS)
def test_no_slower_than_the_baseline(contract, tokens, kind):
    rows = overhead.measure(
        contract, tokens, kind, torch.float32, CPU, ("eager", "op", "module"), ROUNDS, CALLS
    )
    known = overhead.baseline()
    for row in rows:
        assert "failed" not in row, row
        bound = MARGIN * known[overhead.key(row)]["over_eager"]
        assert row["over_eager"]["best"] <= bound, row
