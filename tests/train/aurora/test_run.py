"""Whole runs, reduced: three methods, one table, resumed after a kill, kept when finished."""

import json

import pytest
import torch
from safetensors.torch import load_file

from mmadapt.eval import Comparison
from mmadapt.train import (
    Console,
    RecipeError,
    RunError,
    evaluate,
    find_recipe,
    load_recipe,
    train,
    validate,
)
from mmadapt.train.aurora import trainer as trainers
from mmadapt.train.aurora.trainer import STATE, ObjectiveTrainer

QUIET = Console(quiet=True)


@pytest.mark.parametrize("task", ["retrieval", "vqa"])
def test_a_reduced_run(task, recipe, tmp_path):
    count = 6 if task == "retrieval" else 3
    epochs = f"train.num_train_epochs={count}"
    wanted = recipe(task, epochs)
    outcome = train(wanted, console=QUIET)
    results = outcome.results
    names = [row.name for row in results.rows]
    assert names[1:] == ["frozen model", "full", "lora", "aurora"]
    full, lora, aurora = results.rows[2:]
    assert full.trainable == results.parameters > aurora.trainable >= lora.trainable > 0
    for row in (full, lora, aurora):
        losses = torch.tensor([loss for _, loss in row.loss]).view(count, -1).mean(1)
        if task == "vqa":
            assert losses[-1] < losses[0], (row.name, losses)
        elif row is full:  # in epoch 0 the queue's random vectors still make it easy
            assert losses[-1] < losses[1], losses
        assert row.seconds > 0 and row.saved_mib > 0 and row.state_mib > 0
    assert full.state_mib > 5 * aurora.state_mib
    for row in results.rows:
        assert set(row.scores) == set(results.columns)
        assert all(0 <= value <= 100 for value in row.scores.values())

    text = (tmp_path / "run" / "metrics.json").read_text()
    assert Comparison.from_json(text) == results
    assert str(tmp_path) not in text and results.model == "${out}/backbone"
    page = outcome.report.read_text()
    assert "aurora" in page and f"{aurora.trainable:,}" in page and "<svg" in page

    # again: nothing is trained or evaluated twice
    again = train(wanted, console=QUIET)
    assert again.results == results
    if task == "vqa":
        return
    assert validate(wanted, QUIET) == []
    # evaluated again with other settings, the same weights
    other = evaluate(tmp_path / "run", overrides=["eval.baseline=false"], console=QUIET)
    assert [row.scores for row in other.results.rows] == [r.scores for r in results.rows[2:]]
    changed = recipe(task, epochs, "methods.aurora.lr=1e-5")
    with pytest.raises(RunError, match=r"holds method|holds stage 'lora'|other settings"):
        train(changed, console=QUIET)


class _Killed(Exception):
    pass


def test_a_killed_method_ends_with_the_same_weights(recipe, tmp_path, monkeypatch):
    """Queue, momentum copies, optimizer and random state all come back."""
    only = ("methods.full=null", "methods.lora=null", "eval.baseline=false", "objective.alpha=0.4")
    whole = recipe("retrieval", *only, f"out={tmp_path}/whole")
    train(whole, console=QUIET)
    expected = load_file(tmp_path / "whole" / "aurora" / STATE)

    step = ObjectiveTrainer.training_step

    def killed(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise _Killed
        return step(self, *args, **kwargs)

    broken = recipe(
        "retrieval",
        *only,
        f"out={tmp_path}/broken",
        f"model.name={tmp_path}/whole/backbone",
        f"data.root={tmp_path}/whole/data",
    )
    monkeypatch.setattr(trainers.ObjectiveTrainer, "training_step", killed)
    with pytest.raises(_Killed):
        train(broken, console=QUIET)
    monkeypatch.setattr(trainers.ObjectiveTrainer, "training_step", step)
    train(broken, console=QUIET)
    manifest = json.loads((tmp_path / "broken" / "manifest.json").read_text())
    assert manifest["stages"]["aurora"]["metrics"]["resumed"] is True
    found = load_file(tmp_path / "broken" / "aurora" / STATE)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def test_the_optimizer_is_the_released_one(recipe, tmp_path, monkeypatch):
    seen = {}

    def stop(self, *args, **kwargs):
        seen["groups"] = self.optimizer.param_groups
        raise _Killed

    monkeypatch.setattr(trainers.ObjectiveTrainer, "training_step", stop)
    only = ("methods.full=null", "methods.lora=null")
    with pytest.raises(_Killed):
        train(recipe("retrieval", *only), console=QUIET)
    (group,) = seen["groups"]
    assert group["betas"] == (0.9, 0.999) and group["eps"] == 1e-8
    assert group["weight_decay"] == 0.05 and any(p.ndim == 1 for p in group["params"])


def test_what_cannot_be_evaluated_is_not_trained(recipe, tmp_path):
    with pytest.raises(RecipeError, match=r"eval\.k_test: expected at most 12, .* got 13"):
        train(recipe("retrieval", "eval.k_test=13"), console=QUIET)
    wanted = recipe("vqa", f"data.answers={tmp_path}/none.json", f"data.root={tmp_path}/vqa")
    with pytest.raises(RecipeError, match=r"data\.answers: .*cannot be read"):
        train(wanted, console=QUIET)
    assert not (tmp_path / "run" / "backbone").exists()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["retrieval", "vqa"])
def test_the_shipped_recipe_beats_chance_and_the_frozen_model(task, tmp_path):
    wanted = load_recipe(find_recipe(f"aurora_digits_{task}"), [f"out={tmp_path}/run"])
    results = train(wanted, console=QUIET).results
    column = "t2i R@5" if task == "retrieval" else "accuracy"
    scores = {row.name: row.scores[column] for row in results.rows}
    blind = scores.pop(results.rows[0].name)
    frozen = scores.pop("frozen model")
    for name, score in scores.items():
        assert score > 1.3 * blind, (name, score, blind)
        assert score > frozen + 5, (name, score, frozen)
