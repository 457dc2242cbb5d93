"""Whole training runs against plain torch."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch

from mmadapt.peft.aurora.linear import AuroraLinear

_spec = importlib.util.spec_from_file_location("plain", Path(__file__).with_name("plain.py"))
plain = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(plain)

STEPS = 100


def curve(run, parameters, lr=2e-3):
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.05)
    # Many numbers, because the loss of few jumps with the last bit of bf16.
    target = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(4))
    losses = []
    for _ in range(STEPS):
        loss = (run().question_embeds.float() - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.tensor(losses)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("core", ["dense", pytest.param("diagonal", marks=pytest.mark.slow)])
def test_loss_curves(tiny, core):
    base, batch = tiny.base("retrieval", layers=1), tiny.batch("retrieval")
    twin = copy.deepcopy(base)
    model = tiny.aurora("retrieval", base, init_weights=True, core=core)
    parameters = {
        n: p.detach().clone().requires_grad_() for n, p in plain.parameters_of(model).items()
    }
    config = model.active_peft_config
    expected = curve(lambda: plain.run(twin, parameters, config, batch), parameters.values())
    found = curve(lambda: model(**batch), trained(model))
    assert expected[-1] < 0.9 * expected[0]
    assert ((found - expected).abs() / expected).max() <= 1e-3


@pytest.mark.slow
def test_loss_curves_bf16(tiny, monkeypatch):
    """One operator against base and update in plain torch, both in bf16."""
    batch = tiny.batch("retrieval", dtype=torch.bfloat16)
    curves = []
    for fused in (True, False):
        base = tiny.base("retrieval", layers=1, dtype=torch.bfloat16)
        model = tiny.aurora("retrieval", base, init_weights=True)
        if not fused:
            monkeypatch.setattr(AuroraLinear, "can_fuse", lambda *args: False)
        curves.append(curve(lambda model=model: model(**batch), trained(model)))
    found, expected = curves
    assert expected[-1] < 0.9 * expected[0]
    assert ((found - expected).abs() / expected).max() <= 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "retrieval"])
def test_compiled_equals_eager(tiny, kind):
    """In one graph, with the contraction in it."""
    model, batch = tiny.aurora(kind, tiny.base(kind, layers=1)), tiny.batch(kind)
    expected = tiny.loss(kind, model, batch)
    expected.backward()
    gradients = tiny.gradients(model)
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = tiny.loss(kind, compiled, batch)
    found.backward()
    torch.testing.assert_close(found, expected)
    for name, gradient in tiny.gradients(model).items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-3, atol=1e-5, msg=name)
