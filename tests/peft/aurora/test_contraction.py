"""Contracted modes: once per optimiser step, and never out of date."""

import copy
import gc
import weakref

import pytest
import torch

from mmadapt.peft.aurora.contraction import contract
from mmadapt.peft.aurora.linear import AuroraLinear


def layers(model):
    return [m for m in model.modules() if isinstance(m, AuroraLinear)]


def current(model):
    """All contracted modes as layers get them now."""
    return torch.cat([m.flatten() for layer in layers(model) for m in layer.modes("default")])


def expected(model):
    """The same, weight by weight."""
    core = model.base_model.factors["default"].core
    modes = []
    for layer in layers(model):
        for p in layer.mode_vectors("default"):
            modes.append((core @ p if core.ndim == 3 else core * p).flatten())
    return torch.cat(modes)


def test_batched_equals_one_by_one():
    core, modes = torch.randn(8, 8, 8), torch.randn(5, 8)
    batched = contract(core, modes)
    for mode, matrix in zip(modes, batched, strict=True):
        single = torch.einsum("abr,r->ab", core, mode)
        assert (matrix - single).norm() / single.norm() <= 1e-6
    core, modes = core.mul(4).round(), modes.mul(4).round()
    exact = torch.stack([torch.einsum("abr,r->ab", core, mode) for mode in modes])
    assert torch.equal(contract(core, modes), exact)
    assert torch.equal(contract(core[0, 0], modes), modes * core[0, 0])


@pytest.mark.parametrize("kind", ["retrieval", "llama"])
def test_once_per_step(tiny, kind, core):
    model = tiny.aurora(kind, core=core, mlp_layout="clean").train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    contraction, batch = model.base_model.contraction, tiny.batch(kind)
    for step in range(3):
        (tiny.loss(kind, model, batch) + tiny.loss(kind, model, batch)).backward()
        assert contraction.count == step + 1
        optimizer.step()
        optimizer.zero_grad()
    for _ in range(3):
        tiny.scores(kind, model.eval(), batch)
    assert contraction.count == 4


CHANGES = {
    "in place": lambda p: p.mul_(1.5),
    "another tensor": lambda p: setattr(p, "data", p.data * 1.5),
    "initialisation": lambda p: torch.nn.init.normal_(p),
}


@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.parametrize("which", ["core", "mode"])
def test_changes_are_seen(tiny, change, which):
    model = tiny.aurora("llama")
    before = current(model)
    layer = layers(model)[3]
    core = model.base_model.factors["default"].core
    with torch.no_grad():
        CHANGES[change](core if which == "core" else layer.mode_vectors("default"))
    assert not torch.equal(current(model), before)
    torch.testing.assert_close(current(model), expected(model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),  # moves no version counter
        lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
        lambda p: torch.optim.SGD(p, lr=0.1),
    ],
)
@pytest.mark.parametrize("look_before_step", [False, True])
def test_optimisers_are_seen(tiny, make, look_before_step):
    model = tiny.aurora("llama").train()
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    for _ in range(2):
        tiny.loss("llama", model, tiny.batch("llama")).backward()
        if look_before_step:
            current(model)
        optimizer.step()
        torch.testing.assert_close(current(model), expected(model), rtol=1e-5, atol=1e-6)


def test_an_update_by_hand_is_seen(tiny):
    """Through `.data`, which moves no version counter; a backward pass announces it."""
    model = tiny.aurora("llama").train()
    tiny.loss("llama", model, tiny.batch("llama")).backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.data.sub_(0.1 * parameter.grad)
    torch.testing.assert_close(current(model), expected(model), rtol=1e-5, atol=1e-6)
    model.base_model.factors["default"].core.data.mul_(2)
    model.base_model.contraction.clear()  # outside of training it has to be said
    torch.testing.assert_close(current(model), expected(model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("core", ["dense", "diagonal"])
def test_gradients(tiny, core):
    model = tiny.aurora("retrieval", core=core, mlp_layout="clean").double()
    leaves = [layer.mode_vectors("default") for layer in layers(model)]
    leaves.append(model.base_model.factors["default"].core)
    weights = torch.randn_like(current(model))
    for _ in range(2):  # the same graph serves several backward passes
        found = torch.autograd.grad(current(model) @ weights, leaves)
        known = torch.autograd.grad(expected(model) @ weights, leaves)
        for a, b in zip(found, known, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_parts_of_the_graph_may_be_unused(tiny):
    model = tiny.aurora("llama")
    first, second, *_ = layers(model)
    first.modes("default")[0].sum().backward()
    assert first.mode_vectors("default").grad.any()
    assert second.mode_vectors("default").grad is None


@pytest.mark.parametrize("frozen", ["core", "modes"])
def test_frozen_parts_get_no_gradient(tiny, frozen):
    model = tiny.aurora("llama")
    core = model.base_model.factors["default"].core
    modes = [layer.mode_vectors("default") for layer in layers(model)]
    current(model)
    for parameter in [core] if frozen == "core" else modes:
        parameter.requires_grad_(False)
    current(model).sum().backward()
    assert (core.grad is None) == (frozen == "core")
    assert all((mode.grad is None) == (frozen == "modes") for mode in modes)


def test_a_change_between_forward_and_backward_is_an_error(tiny):
    model = tiny.aurora("llama")
    loss = current(model).sum()
    with torch.no_grad():
        layers(model)[0].mode_vectors("default").add_(1)
    with pytest.raises(RuntimeError, match="modified in place"):
        loss.backward()


def test_inference_mode_leaves_nothing_behind(tiny):
    model, batch = tiny.aurora("llama"), tiny.batch("llama")
    with torch.inference_mode():
        model(**batch)
    tiny.loss("llama", model, batch).backward()
    assert model.base_model.factors["default"].core.grad.any()


def test_loaded_weights_are_seen(tiny):
    model, other = tiny.aurora("llama"), tiny.aurora("llama", seed=9)
    current(model)
    model.load_state_dict(other.state_dict())
    assert not model.base_model.contraction._batches
    assert torch.equal(current(model), current(other))


def test_graphs_are_not_kept_alive(tiny):
    model = tiny.aurora("retrieval")
    batch = tiny.batch("retrieval")
    output = model(**batch)
    states = weakref.ref(output.last_hidden_state)
    gone = weakref.ref(model.base_model)
    del output
    assert states() is None  # without a backward pass, and without the garbage collector
    del model
    gc.collect()
    assert gone() is None


def test_copies_have_their_own(tiny):
    model = tiny.aurora("llama")
    before = current(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.base_model.factors["default"].core.mul_(2)
    assert torch.equal(current(model), before)
    torch.testing.assert_close(current(other), 2 * before)
