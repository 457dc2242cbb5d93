"""The reference backend's two ways to pick rows: gathered (CPU) and blanked (other devices)."""

import pytest
import torch

from mmadapt.kernels.modality_gate import reference as gate_reference
from mmadapt.kernels.swiglu_adapter import reference as swiglu_reference
from mmadapt.ops import modality_gate, projected_modality_gate, swiglu_adapter
from mmadapt.ops._backends.reference import _rows

pytestmark = pytest.mark.usefixtures("poison_new_buffers")


@pytest.fixture(autouse=True)
def blanked(monkeypatch):
    monkeypatch.setattr(_rows, "_gathers", lambda selected: False)


def leaf(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def agree(ours, theirs, inputs):
    torch.testing.assert_close(ours, theirs)
    dy = torch.randn_like(theirs)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, dy), torch.autograd.grad(theirs, inputs, dy), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("residual", ["input", "norm", "none"])
@pytest.mark.parametrize("share_up", [False, True])
def test_swiglu_adapter(residual, share_up):
    inputs = [leaf(11, 6), leaf(3, 4, 6), leaf(3, 4, 6), leaf(1 if share_up else 3, 6, 4)]
    norm = (leaf(6), 1e-5)
    settings = {"expert": torch.randint(-1, 3, (11,)), "norm": norm, "residual": residual}
    agree(
        swiglu_adapter(*inputs, **settings, backend="reference"),
        swiglu_reference.swiglu_adapter(*inputs, **settings),
        [*inputs, norm[0]],
    )


@pytest.mark.parametrize("logits", [(3,), (11, 3)])
def test_modality_gate(logits):
    inputs, mask = [leaf(11, 3, 4), leaf(*logits)], torch.rand(11) < 0.5
    agree(modality_gate(*inputs, mask), gate_reference.modality_gate(*inputs, mask), inputs)


def test_projected_modality_gate():
    inputs, mask = [leaf(11, 3, 4), leaf(11, 5), leaf(3, 5)], torch.rand(11) < 0.5
    ours = projected_modality_gate(*inputs, mask)
    agree(ours, gate_reference.projected_modality_gate(*inputs, mask), inputs)


def test_foreign_tokens_stay_untouched():
    """A weight full of NaN reaches its own expert's tokens only."""
    x, gate, down, up = (
        t.detach() for t in (leaf(6, 4), leaf(2, 3, 4), leaf(2, 3, 4), leaf(2, 4, 3))
    )
    expert = torch.tensor([0, 1, 0, 1, 0, -1])
    before = swiglu_adapter(x, gate, down, up, expert=expert)
    up[1] = float("nan")
    after = swiglu_adapter(x, gate, down, up, expert=expert)
    assert torch.equal(after[expert != 1], before[expert != 1])
