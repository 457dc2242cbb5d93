"""How the weights of an FFN are cut into square ones: exact, on integers."""

import pytest
import torch

from mmadapt.peft.aurora.contraction import contract
from mmadapt.peft.aurora.layouts import chunk_modes, tall_factor, wide_factor

CHUNKS = 4


def integers(*shape):
    return torch.randint(-3, 4, shape, dtype=torch.float64)


@pytest.mark.parametrize("rank", [4, 8, 64])
def test_released_layout(rank):
    """Element by element, as the published formula has it."""
    core, modes = integers(rank, rank, rank), integers(CHUNKS, rank)
    up = chunk_modes(contract(core, modes), "up", "released")
    down = chunk_modes(contract(core, modes), "down", "released")
    assert len(up) == len(down) == CHUNKS
    columns = range(rank) if rank <= 8 else (0, 1, 31, 62, 63)
    for g in range(CHUNKS):
        for wide in columns:
            b, j = divmod(rank * g + wide, CHUNKS)
            for a in columns:
                expected = sum(core[a, b, r] * modes[j, r] for r in range(rank))
                assert up[g][a, wide] == expected
                assert down[g][wide, a] == expected  # contracts the other axis


@pytest.mark.parametrize("kind", ["up", "down"])
def test_clean_layout(kind):
    core, modes = integers(8, 8, 8), integers(CHUNKS, 8)
    for mode, vector in zip(chunk_modes(contract(core, modes), kind, "clean"), modes, strict=True):
        assert torch.equal(mode, torch.einsum("abr,r->ab", core, vector))


@pytest.mark.parametrize("layout", ["released", "clean"])
@pytest.mark.parametrize("kind", ["up", "down", "fused"])
def test_a_diagonal_core_is_a_superdiagonal_one(kind, layout):
    diagonal, modes = integers(8), integers(CHUNKS, 8)
    core = torch.zeros(8, 8, 8, dtype=torch.float64)
    core[range(8), range(8), range(8)] = diagonal
    few = chunk_modes(contract(diagonal, modes), kind, layout)
    full = chunk_modes(contract(core, modes), kind, layout)
    for mode, expected in zip(few, full, strict=True):
        assert torch.equal(torch.diag(mode) if mode.ndim == 1 else mode, expected)


@pytest.mark.parametrize("shape", [(8,), (8, 8)])
def test_folded_factors(shape):
    """Stacked outputs, and the sum over inputs side by side, through one factor each."""
    factor_in, factor_out = integers(8, 5), integers(6, 8)
    modes = [integers(*shape) for _ in range(3)]
    matrices = [torch.diag(m) if m.ndim == 1 else m for m in modes]
    x = integers(2, 5)
    stacked = torch.cat([x @ factor_in.t() @ m @ factor_out.t() for m in matrices], dim=-1)
    assert torch.equal(x @ factor_in.t() @ tall_factor(factor_out, modes).t(), stacked)
    xs = [integers(2, 5) for _ in range(3)]
    total = sum(x @ factor_in.t() @ m @ factor_out.t() for x, m in zip(xs, matrices, strict=True))
    wide = wide_factor(factor_in, modes)
    assert torch.equal(torch.cat(xs, dim=-1) @ wide.t() @ factor_out.t(), total)
