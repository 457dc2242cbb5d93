"""A fresh adapter: initialisation, what it changes, what its first step moves."""

import copy
import math

import pytest
import torch
from peft import get_peft_model

from mmadapt.peft import AuroraConfig

RANK, WIDTH = 64, 256
GQT = ("scale_self", "shift_self", "scale_cross", "shift_cross")


@pytest.fixture(scope="module")
def wide():
    """Enough numbers to measure a distribution."""
    from transformers import BlipConfig, BlipForImageTextRetrieval

    torch.manual_seed(0)
    text = {"hidden_size": WIDTH, "encoder_hidden_size": WIDTH, "num_hidden_layers": 3}
    vision = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 3}
    shape = {"num_attention_heads": 4}
    config = BlipConfig(
        text_config=text | shape | {"vocab_size": 50, "max_position_embeddings": 16},
        vision_config=vision | shape | {"image_size": 16},
    )
    return get_peft_model(BlipForImageTextRetrieval(config), AuroraConfig(rank=RANK))


def named(model, part):
    return [p.detach().flatten() for n, p in model.named_parameters() if part in n]


def test_shared_factors(wide):
    factors = wide.base_model.factors["default"]
    assert not factors.factor_out(WIDTH).any()
    assert factors.core.abs().max() <= math.sqrt(3) / RANK
    assert factors.core.std().item() == pytest.approx(1 / RANK, rel=0.01)
    assert factors.factor_in(WIDTH).abs().max() <= 1 / math.sqrt(WIDTH)
    assert factors.factor_in(WIDTH).std().item() == pytest.approx(
        1 / math.sqrt(3 * WIDTH), rel=0.02
    )


@pytest.mark.parametrize(
    "modules, fan",
    [
        (("qkv", "projection"), 4),
        (("fc1", "fc2"), 8),
        (("query", "key", "value"), 1),
    ],
)
def test_mode_vectors(wide, modules, fan):
    modes = torch.cat([p for m in modules for p in named(wide, f".{m}.mmadapt_aurora_mode")])
    bound = math.sqrt(6 / (RANK + fan))
    assert 0.95 * bound <= modes.abs().max() <= bound
    assert modes.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_query_transformation(wide):
    vectors = torch.cat([p for part in GQT for p in named(wide, f"mmadapt_aurora_{part}")])
    assert vectors.numel() == 4 * 3 * WIDTH
    assert vectors.std().item() == pytest.approx(2e-4, rel=0.05)


def test_the_diagonal_core_is_ones(tiny):
    model = tiny.aurora("llama", core="diagonal")
    assert torch.equal(model.base_model.factors["default"].core, torch.ones(8))


def test_it_is_the_base_model(tiny, kind, core):
    base, batch = tiny.base(kind), tiny.batch(kind)
    expected = tiny.scores(kind, base, batch)
    model = tiny.aurora(kind, base, init_weights=True, gqt=False, core=core)
    torch.testing.assert_close(tiny.scores(kind, model, batch), expected, rtol=0, atol=1e-6)


def test_the_released_query_transformation_starts_near_nothing(tiny):
    base, batch = tiny.base("retrieval"), tiny.batch("retrieval")
    with torch.no_grad():
        expected = base(**batch).question_embeds[:, 0]
        found = tiny.aurora("retrieval", base, init_weights=True)(**batch).question_embeds[:, 0]
    assert 0 < (found - expected).norm() / expected.norm() <= 5e-3


def test_the_first_step_moves_what_it_should(tiny):
    """With factor_out zero, factor_in, core and mode vectors have a gradient of exactly zero."""
    heads = ["vision_proj", "itm_head"]
    model = tiny.aurora("retrieval", init_weights=True, modules_to_save=heads).train()
    batch = tiny.batch("retrieval")
    tiny.loss("retrieval", model, batch).backward()
    contrast = model(**batch, use_itm_head=False).itm_score
    contrast.square().sum().backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert all(any(part in n for part in (*GQT, *heads, "factor_out_32")) for n in moved)
    assert {p for p in (*GQT, *heads, "factor_out_32") if any(p in n for n in moved)} == {
        *GQT,
        *heads,
        "factor_out_32",
    }
    still = {n: p for n, p in model.named_parameters() if "aurora_mode." in n or n.endswith("core")}
    assert len(still) > 20
    assert not [n for n, p in still.items() if p.grad is None or p.grad.any()]


def test_training_leaves_the_rest_alone(tiny, kind):
    """Frozen tensors bit by bit, the text projection of retrieval among them."""
    model = tiny.aurora(kind, init_weights=True, branch_dropout=0.1).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    buffers = copy.deepcopy(dict(model.named_buffers()))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.05)
    for _ in range(3):
        tiny.loss(kind, model, tiny.batch(kind)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        assert ("mmadapt_aurora_" in name) == parameter.requires_grad, name
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
