"""CPFactors and CPLinear."""

import copy
import math

import pytest
import torch

from mmadapt import nn

CORES = ["diagonal", "dense"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def build(core="diagonal", bias=True, **settings):
    factors = nn.CPFactors(6, 5, 4, core, dtype=torch.float64)
    base = torch.nn.Linear(6, 5, bias=bias, dtype=torch.float64)
    return nn.CPLinear(base, factors, **settings)


def randomise(module):
    for parameter in (module.factors.factor_out, module.factors.core):
        torch.nn.init.normal_(parameter)
    return module


@pytest.mark.parametrize("core", CORES)
def test_a_fresh_layer_is_its_base(core):
    layer, x = build(core), torch.randn(2, 3, 6, dtype=torch.float64)
    assert torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("core", CORES)
def test_delta_weight_is_the_merged_update(core, bias):
    layer = randomise(build(core, bias, scale=0.5))
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    merged = copy.deepcopy(layer.base)
    with torch.no_grad():
        merged.weight += layer.delta_weight()
    torch.testing.assert_close(layer(x), merged(x))


def test_dense_contraction_is_the_released_one():
    factors = nn.CPFactors(6, 5, 4, "dense")
    mode = torch.randn(4)
    expected = torch.einsum("abr,r->ab", factors.core, mode)
    torch.testing.assert_close(factors.contract(mode), expected)


def test_a_superdiagonal_core_equals_the_diagonal_one():
    diagonal, dense = randomise(build("diagonal")), build("dense")
    with torch.no_grad():
        dense.factors.core.zero_()
        dense.factors.core[range(4), range(4), range(4)] = diagonal.factors.core
        for name in ("factor_in", "factor_out"):
            getattr(dense.factors, name).copy_(getattr(diagonal.factors, name))
        dense.mode.copy_(diagonal.mode)
        dense.base.load_state_dict(diagonal.base.state_dict())
    x = torch.randn(7, 6, dtype=torch.float64)
    torch.testing.assert_close(dense(x), diagonal(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("core", CORES)
def test_only_factors_and_mode_train_and_the_first_step_moves_factor_out(core):
    layer = build(core)
    layer(torch.randn(7, 6, dtype=torch.float64)).square().sum().backward()
    assert layer.base.weight.grad is None and layer.base.bias.grad is None
    assert layer.factors.factor_out.grad.abs().sum() > 0
    for parameter in (layer.factors.factor_in, layer.factors.core, layer.mode):
        assert (parameter.grad == 0).all()


def test_layers_share_factors():
    factors = nn.CPFactors(6, 6, 4)
    model = torch.nn.Sequential(*(nn.CPLinear(torch.nn.Linear(6, 6), factors) for _ in range(3)))
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == 2 * 6 * 4 + 4 + 3 * 4
    torch.nn.init.normal_(factors.factor_out)
    model(torch.randn(7, 6)).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in trainable)


def test_dropout_acts_in_training_only():
    layer = randomise(build("dense", dropout=0.5))
    x = torch.randn(7, 6, dtype=torch.float64)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_initialisation_is_the_published_one():
    rank, dim = 64, 768
    factors = nn.CPFactors(dim, dim, rank, "dense")
    assert factors.factor_in.abs().max() <= 1 / math.sqrt(dim)
    assert factors.factor_in.std().item() == pytest.approx(0.0208, rel=0.01)
    assert (factors.factor_out == 0).all()
    assert factors.core.abs().max() <= math.sqrt(3) / rank
    assert factors.core.std().item() == pytest.approx(1 / rank, rel=0.01)
    assert (nn.CPFactors(dim, dim, rank).core == 1).all()
    layer = nn.CPLinear(torch.nn.Linear(dim, dim, device="meta"), factors)
    assert layer.mode.abs().max() <= math.sqrt(6 / (rank + 1))
    assert layer.mode.std() > 0.5 * math.sqrt(2 / (rank + 1))
