"""ModalityGate."""

import pytest
import torch

from mmadapt import nn

DIM, HEADS, SIZE = 12, 3, 4


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", ["token", "static"])
def test_a_fresh_gate_erases_masked_values_and_nothing_else(kind):
    gate = nn.ModalityGate(DIM, HEADS, kind)
    value, hidden = torch.randn(2, 5, HEADS * SIZE), torch.randn(2, 5, DIM)
    mask = torch.rand(2, 5) < 0.5
    y = gate(value, mask, hidden)
    assert (y[mask] == 0).all()
    assert torch.equal(y[~mask], value[~mask])


@pytest.mark.parametrize("kind", ["token", "static"])
def test_values_are_multiplied_by_the_activation(kind):
    gate = nn.ModalityGate(DIM, HEADS, kind)
    torch.nn.init.normal_(gate.gate)
    value, hidden = torch.randn(2, 5, HEADS, SIZE), torch.randn(2, 5, DIM)
    mask = torch.rand(2, 5) < 0.5
    factor = gate.activation(hidden).expand(2, 5, HEADS)
    y = gate(value, mask, hidden)
    torch.testing.assert_close(y[mask], (value * factor[..., None])[mask])


@pytest.mark.parametrize("kind", ["token", "static"])
def test_text_only_batches_ignore_the_gate(kind):
    """Bitwise independence of the parameter, and zero gradients instead of None."""
    gate = nn.ModalityGate(DIM, HEADS, kind)
    value, hidden = torch.randn(2, 5, HEADS * SIZE), torch.randn(2, 5, DIM)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    before = gate(value, mask, hidden)
    with torch.no_grad():
        gate.gate.fill_(3.0)
    after = gate(value, mask, hidden)
    assert torch.equal(before, after)
    after.sum().backward()
    assert torch.equal(gate.gate.grad, torch.zeros_like(gate.gate))


def test_a_token_gate_needs_hidden_states():
    gate = nn.ModalityGate(DIM, HEADS)
    value, mask = torch.randn(5, HEADS * SIZE), torch.ones(5, dtype=torch.bool)
    with pytest.raises(ValueError, match="hidden is None, expected"):
        gate(value, mask)
    with pytest.raises(ValueError, match="hidden is None, expected"):
        gate.activation()
