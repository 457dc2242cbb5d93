"""Choice of the backend: preference, crossover, override, explanation."""

import sys
from types import ModuleType

import pytest
import torch

import mmadapt
from mmadapt.ops import (
    BackendError,
    _backends,
    backends,
    cp_linear,
    explain,
    modality_gate,
    swiglu_adapter,
)
from mmadapt.ops._backends import _crossovers

X, GATE, DOWN, UP = torch.randn(4, 8), torch.randn(3, 8), torch.randn(3, 8), torch.randn(8, 3)
CALL = (X, GATE, DOWN, UP)


@pytest.fixture
def fast(monkeypatch):
    """A second backend of swiglu_adapter, preferred from 3 tokens on, that refuses fp64."""
    from mmadapt.ops._backends.reference import swiglu_adapter as reference

    def unsupported(x, *operands):
        return "x is torch.float64, expected torch.float32" if x.dtype == torch.float64 else None

    def forward(*args):
        calls.append(args)
        return reference.forward(*args)

    calls = []
    module = ModuleType("fast_backend")
    module.forward, module.backward, module.unsupported = forward, reference.backward, unsupported
    monkeypatch.setitem(sys.modules, "fast_backend", module)
    registry = {"fast": "fast_backend", "missing": "no_such_module_anywhere"}
    registry["reference"] = "mmadapt.ops._backends.reference.swiglu_adapter"
    monkeypatch.setitem(_backends._REGISTRY, "swiglu_adapter", registry)
    monkeypatch.setitem(_crossovers.MIN_TOKENS, ("swiglu_adapter", "fast"), 3)
    monkeypatch.setattr(_backends, "_LOADED", {})
    monkeypatch.delenv("MMADAPT_BACKEND", raising=False)
    return calls


def test_preference_order(fast):
    swiglu_adapter(*CALL)
    assert len(fast) == 1
    choice = explain(swiglu_adapter, *CALL)
    assert choice.backend == "fast" and choice.requested is None
    assert choice.refused["reference"] == "fast is preferred"
    assert "no_such_module_anywhere" in choice.refused["missing"]
    assert str(choice).splitlines()[0] == "swiglu_adapter: fast (automatic)"


def test_crossover(fast):
    swiglu_adapter(X[:2], *CALL[1:])
    assert fast == []
    choice = explain(swiglu_adapter, X[:2], *CALL[1:])
    assert choice.backend == "reference"
    assert choice.refused["fast"] == "2 tokens are below its crossover of 3"
    assert explain(swiglu_adapter, X[:2], *CALL[1:], backend="fast").backend == "fast"


def test_failed_constraint(fast):
    call = [t.double() for t in CALL]
    swiglu_adapter(*call)
    choice = explain("swiglu_adapter", *call)
    assert choice.backend == "reference"
    assert choice.refused["fast"] == "x is torch.float64, expected torch.float32"


def test_a_named_backend_that_cannot_is_an_error(fast):
    call = [t.double() for t in CALL]
    with pytest.raises(BackendError, match=r"'fast' cannot run this swiglu_adapter: x is torch.fl"):
        swiglu_adapter(*call, backend="fast")
    with pytest.raises(BackendError, match=r"'missing' cannot run.*no_such_module_anywhere"):
        swiglu_adapter(*CALL, backend="missing")
    with pytest.raises(
        BackendError, match=r"'warp' does not exist for swiglu_adapter; it has fast"
    ):
        swiglu_adapter(*CALL, backend="warp")


def test_environment_variable(fast, monkeypatch):
    monkeypatch.setenv("MMADAPT_BACKEND", "reference")
    swiglu_adapter(*CALL)
    assert fast == []
    choice = explain(swiglu_adapter, *CALL)
    assert choice.backend == choice.requested == "reference"
    assert choice.refused["fast"] == "reference was requested"
    swiglu_adapter(*CALL, backend="fast")
    assert len(fast) == 1
    monkeypatch.setenv("MMADAPT_BACKEND", "warp")
    with pytest.raises(BackendError, match="'warp' does not exist"):
        swiglu_adapter(*CALL)


def test_environment_variable_per_contract(fast, monkeypatch):
    gate = (X, torch.zeros(2), torch.ones(4, dtype=torch.bool))
    monkeypatch.setenv("MMADAPT_BACKEND", "swiglu_adapter:fast, cp_linear:reference")
    assert explain(swiglu_adapter, *CALL).requested == "fast"
    assert explain(modality_gate, *gate).requested is None
    monkeypatch.setenv("MMADAPT_BACKEND", "softmax:fast")
    with pytest.raises(BackendError, match="names 'softmax', expected one of swiglu_adapter"):
        swiglu_adapter(*CALL)


def test_availability(fast):
    listed = backends("swiglu_adapter")
    assert listed["fast"] is listed["reference"] is None
    assert listed["missing"].startswith("not available: ")


def test_explain_serves_every_contract():
    weight = torch.randn(8, 8)
    assert mmadapt.explain is explain
    calls = {
        "cp_linear": (X, weight, None, GATE, UP, torch.ones(3)),
        "cp_linear_group": (X, [weight], None, GATE, UP, [torch.ones(3)]),
        "modality_gate": (X, torch.zeros(2), torch.ones(4, dtype=torch.bool)),
        "projected_modality_gate": (X, X, weight[:2], torch.ones(4, dtype=torch.bool)),
    }
    for name, call in calls.items():
        assert explain(name, *call).backend == "reference"
    assert explain(cp_linear, *calls["cp_linear"]).op == "cp_linear"
    assert explain(modality_gate, *calls["modality_gate"]).op == "modality_gate"
    with pytest.raises(ValueError, match=r"op must be one of swiglu_adapter, .* got 'softmax'"):
        explain("softmax")


def test_explain_checks_arguments():
    with pytest.raises(ValueError, match="gate has shape"):
        explain(swiglu_adapter, X, GATE[:, :7], DOWN, UP)
