"""Guard rails: silent components, absent images, broken losses."""

import math
from types import SimpleNamespace

import pytest
import torch

from mmadapt.train import GuardError
from mmadapt.train.components import (
    count,
    judged_for_gradients,
    parameter_groups,
    trainable,
)
from mmadapt.train.config import Rates
from mmadapt.train.errors import RecipeError
from mmadapt.train.guards import Guards, image_fraction, samples_to_judge

IMAGE = 7


def tensor(*shape, grad=None, frozen=False):
    parameter = torch.nn.Parameter(torch.zeros(*shape), requires_grad=not frozen)
    if grad is not None:
        parameter.grad = torch.full(shape, float(grad))
    return parameter


def guards(components, *, stage="instruct", fraction=0.0):
    return Guards(components, stage=stage, image_token_id=IMAGE, image_fraction=fraction)


def step(guard, *rows, number=0):
    guard.see({"input_ids": torch.tensor(rows)})
    guard.on_pre_optimizer_step(None, SimpleNamespace(global_step=number), None)


def test_silent_component_is_an_error():
    guard = guards({"text_expert": [("up", tensor(2, grad=0)), ("down", tensor(2))]})
    with pytest.raises(GuardError, match="no gradient reached text_expert in step 1"):
        step(guard, [1, 2])


def test_one_tensor_with_a_gradient_is_enough_for_its_component():
    step(guards({"text_expert": [("up", tensor(2, grad=1)), ("down", tensor(2))]}), [1, 2])


def test_visual_components_wait_for_an_image():
    guard = guards({"projector": [("w", tensor(2, grad=0))]})
    step(guard, [1, 2])
    with pytest.raises(GuardError, match="projector in step 4"):
        step(guard, [1, IMAGE], number=3)


def test_judged_once():
    parameter = tensor(2, grad=1)
    guard = guards({"gate": [("g", parameter)]})
    step(guard, [IMAGE])
    parameter.grad = None
    step(guard, [IMAGE])


def test_data_with_images_must_show_visual_tokens():
    guard = guards({}, fraction=1.0)
    with pytest.raises(GuardError, match="no visual token in the first 2 samples"):
        guard.see({"input_ids": torch.tensor([[1], [2]])})


def test_rare_images_are_waited_for_and_text_data_is_fine():
    patient = guards({}, fraction=0.5)
    for _ in range(14):
        patient.see({"input_ids": torch.tensor([[1], [2]])})
    with pytest.raises(GuardError):
        patient.see({"input_ids": torch.tensor([[1], [2]])})
    text = guards({}, fraction=0.0)
    for _ in range(100):
        text.see({"input_ids": torch.tensor([[1]])})


@pytest.mark.parametrize("fraction", [0.9, 0.5, 0.01])
def test_patience_makes_a_false_alarm_a_one_in_a_billion_event(fraction):
    samples = samples_to_judge(fraction)
    assert (1 - fraction) ** samples <= 1e-9 < (1 - fraction) ** (samples - 1)


def test_image_fraction_counts_samples():
    def sample(kind):
        return SimpleNamespace(messages=[{"content": [{"type": kind}]}])

    assert image_fraction([sample("image"), sample("text")] * 300) in (0.5, 1.0, 0.0)
    assert image_fraction([sample("image"), sample("text"), sample("text"), sample("text")]) == 0.25


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_broken_loss_ends_the_run(loss):
    with pytest.raises(GuardError, match=f"loss is {loss} at step 3"):
        guards({}).on_log(None, SimpleNamespace(global_step=3), None, {"loss": loss})


def components():
    return {
        "projector": [("p.weight", tensor(3, 2))],
        "vision_expert": [
            ("m.layers.0.mlp.up", tensor(2, 2)),
            ("m.layers.1.mlp.up", tensor(2, 2)),
        ],
        "gate": [("m.layers.0.self_attn.gate", tensor(4))],
        "language_model": [("m.layers.0.weight", tensor(5, 5, frozen=True))],
    }


def test_last_vision_expert_is_not_judged_in_instruct():
    names = [
        key for key, _ in judged_for_gradients(components(), stage="instruct")["vision_expert"]
    ]
    assert names == ["m.layers.0.mlp.up"]
    names = [key for key, _ in judged_for_gradients(components(), stage="align")["vision_expert"]]
    assert len(names) == 2


def test_groups_have_rates_by_component_and_decay_by_dimension():
    rates = Rates(default=1.0, projector=0.5)
    groups = parameter_groups(components(), rates, weight_decay=0.02, stage="instruct")
    found = {group["component"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert found == {
        "projector": (0.5, 0.02),
        "vision_expert": (1.0, 0.02),
        "gate": (1.0, 0.0),
    }
    assert sum(p.numel() for group in groups for p in group["params"]) == 6 + 8 + 4


def test_rate_of_an_untrained_component_is_refused():
    with pytest.raises(RecipeError, match=r"stages.align.lr.text_expert: .* trains no text_expert"):
        parameter_groups(
            components(), Rates(default=1.0, text_expert=0.5), weight_decay=0.0, stage="align"
        )


def test_counts():
    rows = {row.component: (row.parameters, row.trainable) for row in count(components())}
    assert rows["language_model"] == (25, 0)
    assert rows["projector"] == (6, 6)
    assert "language_model" not in trainable(components())
