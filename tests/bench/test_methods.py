"""The whole-model methods: twins compute the same, sizes are what they say."""

import pytest
import torch

from bench import llama, methods, probes
from bench.llama import GEOMETRIES, Geometry
from bench.methods import Batch
from tests.bench.conftest import CPU

TINY = GEOMETRIES["tiny"]


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return llama.build(TINY, torch.float32, CPU, head=True)


def build(name, base):
    return methods.build(name, base, TINY, 4, torch.float32)


def gradients(method, batch):
    loss = method.loss(batch)
    grads = torch.autograd.grad(loss, list(method.parameters.values()))
    return loss.detach(), dict(zip(method.parameters, grads, strict=True))


@pytest.fixture
def batch():
    return Batch.draw(2, 40, TINY.vocabulary, torch.float32, CPU)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_pill_is_the_released_equations(base, batch, checkpointing):
    ours, theirs = build("pill", base), build("pill-eager", base)
    for method in (ours, theirs):
        method.checkpointing(checkpointing)
    loss, grads = gradients(ours, batch)
    expected, wanted = gradients(theirs, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert ours.trained == theirs.trained
    norms = [sorted(float(g.norm()) for g in found.values()) for found in (grads, wanted)]
    torch.testing.assert_close(*map(torch.tensor, norms), rtol=1e-4, atol=1e-7)


def test_hand_written_lora_is_pefts(base, batch):
    ours, theirs = build("lora-manual", base), build("lora", base)
    assert ours.trained == theirs.trained
    own = {n.replace("mlp.", ""): p for n, p in ours.parameters.items()}
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in theirs.parameters.items():
            twin = own[of_peft(name)]
            twin.copy_(parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.05))
    loss, grads = gradients(ours, batch)
    expected, wanted = gradients(theirs, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    grads = {n.replace("mlp.", ""): g for n, g in grads.items()}
    for name, gradient in wanted.items():
        torch.testing.assert_close(grads[of_peft(name)], gradient, rtol=1e-3, atol=1e-6, msg=name)


def of_peft(name):
    name = name.removeprefix("base_model.model.").replace("mlp.", "")
    return name.replace(".default.weight", "")


def test_frozen_trains_the_projection_alone(base, batch):
    method = build("frozen", base)
    assert list(method.parameters) == ["projection.weight"]
    _, grads = gradients(method, batch)
    assert grads["projection.weight"].abs().sum() > 0


def test_methods_share_the_frozen_weights(base):
    pointers = {p.data_ptr() for p in base.parameters()}
    for name in methods.METHODS:
        found = {p.data_ptr() for p in build(name, base).model.parameters() if not p.requires_grad}
        assert found == pointers, name


def test_lora_trains_as_many_parameters_as_pill():
    big = GEOMETRIES["llama-7b"]
    wanted = methods.pill_size(big, 32)
    assert wanted == 45_088_768 - 768 * 4096  # docs/pill.md, without the projection
    rank = methods.lora_rank(big, wanted)
    one = methods.pill_size(big, 32) / rank
    assert abs(big.layers * (8 * big.dim + 3 * (big.dim + big.ffn)) - one) / one < 0.05


def test_geometries():
    assert Geometry.of_width(4096) == Geometry(4096, 32, 11008, 1, 32)
    small = Geometry.of_width(32)
    assert small.dim % small.heads == 0
    with pytest.raises(ValueError, match="32 image tokens, got 32"):
        Batch.draw(1, 32, 10, torch.float32, CPU)


def test_rotary_is_hugging_faces(base):
    ids = torch.arange(48)[None]
    theirs = base.model.rotary_emb(torch.zeros(1), ids)
    for a, b in zip(llama.rotary(48, 16, torch.float32, CPU), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", methods.METHODS)
def test_checkpointing_keeps_less(base, batch, name):
    method = build(name, base)

    def kept(on):
        method.checkpointing(on)
        own = {p.untyped_storage().data_ptr() for p in (*base.parameters(),)}
        return probes.kept_bytes(lambda: method.loss(batch), own)

    assert kept(True) < 0.7 * kept(False)
