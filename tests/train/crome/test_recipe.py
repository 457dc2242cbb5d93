"""The CROME recipe, small: what each stage leaves behind, resuming, text alone, earlier tasks."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmadapt.eval import RunResults
from mmadapt.models import CromeForConditionalGeneration
from mmadapt.train import Console, GuardError, RecipeError, RunError, check_recipe, train, validate
from mmadapt.train.crome.build import prepare_crome
from mmadapt.train.crome.weights import load_trained

ADAPTER = {"visual.gate", "visual.down", "text.gate", "text.down", "up"}


@pytest.fixture
def quiet():
    return Console(quiet=True)


def saved(run, stage):
    folder = Path(run) / stage / "adapter"
    return {
        name: value
        for file in folder.glob("*.safetensors")
        for name, value in load_file(file).items()
    }


def test_three_stages(crome_recipe, quiet):
    recipe = crome_recipe()
    outcome = train(recipe, console=quiet)
    run = outcome.run_dir

    parts = {stage: set(saved(run, stage)) for stage in recipe.stages}
    projections = {
        f"{name}_projection.{kind}" for name in ("image", "text") for kind in ("weight", "bias")
    }
    assert parts["align"] == ADAPTER | projections
    assert parts["task"] == ADAPTER
    assert parts["instruct"] > ADAPTER | projections | {"query_tokens"}
    extra = parts["instruct"] - ADAPTER - projections - {"query_tokens"}
    assert all(name.startswith("qformer.") for name in extra)
    files = {p.name for p in (run / "task" / "adapter").iterdir()}
    assert files == {"crome_adapter.safetensors", "crome_adapter.json"}

    results = RunResults.from_json((run / "metrics.json").read_text())
    before, after = results.forgetting.before, results.forgetting.after
    assert before.perplexity == after.perplexity and before.accuracy == after.accuracy
    transfer = results.transfer
    assert transfer.restored == {skill: pair[0] for skill, pair in transfer.source.items()}
    assert transfer.drift.divergence > 0
    trained = {row.component: row.trainable for row in results.parameters}
    assert trained["adapter"] == {"align": 320, "instruct": 320, "task": 320}
    assert trained["projector"] == {"align": 544, "instruct": 544, "task": 0}
    assert trained["qformer"]["align"] == 0 and trained["qformer"]["instruct"] > 0
    assert not any(trained["language_model"].values()) and not any(trained["vision_tower"].values())


@pytest.mark.slow
def test_frozen_parts_stay_those_on_disk(crome_recipe, quiet):
    recipe = crome_recipe(eval=None)
    train(recipe, console=quiet)
    _, fresh = prepare_crome(recipe)
    _, model = prepare_crome(recipe)
    for stage in recipe.stages:
        load_trained(model, Path(recipe.out) / stage / "adapter")
    for (name, a), (_, b) in zip(fresh.named_parameters(), model.named_parameters(), strict=True):
        frozen = name.startswith(("vision_model", "language_model"))
        assert not frozen or torch.equal(a, b), name
    assert not torch.equal(fresh.adapter.up, model.adapter.up)


def test_a_killed_run_ends_with_the_same_weights(crome_recipe, quiet, monkeypatch):
    """Killed in stage (b) and in stage (c): sampler, random crops and schedule go on exactly."""
    whole = crome_recipe(out="whole", eval=None)
    train(whole, console=quiet)
    cut = crome_recipe(out="cut", eval=None)
    from mmadapt.train.trainer import StageTrainer

    original = StageTrainer.compute_loss
    for stage in ("instruct", "task"):

        def dying(self, model, inputs, _stage=stage, **kwargs):
            if self.stage_name == _stage and self.state.global_step == 1:
                raise KeyboardInterrupt
            return original(self, model, inputs, **kwargs)

        monkeypatch.setattr(StageTrainer, "compute_loss", dying)
        with pytest.raises(KeyboardInterrupt):
            train(cut, console=quiet)
        monkeypatch.setattr(StageTrainer, "compute_loss", original)
    train(cut, console=quiet)
    for stage in whole.stages:
        a, b = saved(whole.out, stage), saved(cut.out, stage)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a), stage
    checkpoint = next((Path(cut.out) / "task").glob("checkpoint-*"))
    assert not list(checkpoint.glob("model*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"method__order": ["text", "instruction"]},
        {"method__order": ["visual", "instruction"]},
        {"method__gated": False},
        {"method__reading": "R2"},
        {"method__branches": ["visual"], "method__bias": True},
        {"method__adapter_in_align": False, "method__instruction_aware": False},
    ],
    ids=str,
)
def test_ablations_train(crome_recipe, quiet, changes):
    recipe = crome_recipe(eval=None, stages__instruct=None, **changes)
    train(recipe, console=quiet)
    assert saved(recipe.out, "task")


@pytest.mark.slow
def test_per_epoch_schedule(crome_recipe, quiet):
    rates = {"default": 0.01, "schedule": "per_epoch", "warmup_steps": 1}
    recipe = crome_recipe(eval=None, stages__align=None, stages__task=None)
    values = recipe.model_dump(mode="json")
    values["stages"]["instruct"]["lr"] = rates
    train(check_recipe(values), console=quiet)


def test_a_crome_checkpoint_as_backbone(crome_recipe, quiet, tmp_path):
    """What was built from parts can be saved whole and tuned again, with the same settings."""
    recipe = crome_recipe(eval=None)
    backbone, model = prepare_crome(recipe)
    folder = tmp_path / "crome"
    for part in (model, backbone.tokenizer, backbone.image_processor):
        part.save_pretrained(folder)
    _, again = prepare_crome(crome_recipe(model__name=str(folder), eval=None))
    assert isinstance(again, CromeForConditionalGeneration)
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(RecipeError, match="CROME model of other settings: adapter_rank: 4 -> 5"):
        prepare_crome(crome_recipe(model__name=str(folder), method__rank=5))


def test_no_adapter_leaves_the_task_stage_nothing(crome_recipe, quiet):
    recipe = crome_recipe(eval=None, stages__align=None, stages__instruct=None, method__branches=[])
    with pytest.raises(RecipeError, match=r"stages\.task: stage='task' would train nothing"):
        train(recipe, console=quiet)


def test_weights_of_other_sizes_are_refused(crome_recipe, quiet):
    recipe = crome_recipe(eval=None, stages__instruct=None, stages__task=None)
    train(recipe, console=quiet)
    folder = Path(recipe.out) / "align" / "adapter"
    _, other = prepare_crome(crome_recipe(method__rank=5))
    with pytest.raises(RunError, match="other settings"):
        load_trained(other, folder)
    with pytest.raises(RunError, match="holds no weights of a CROME stage"):
        load_trained(other, folder.parent)


def test_images_that_never_arrive_are_noticed(crome_recipe, quiet, monkeypatch):
    from mmadapt.data import CromeCollator

    original = CromeCollator.__call__

    def blind(self, samples):
        batch = original(self, samples)
        batch["input_ids"][batch["input_ids"] == self.config.image_token_id] = 5
        return batch

    monkeypatch.setattr(CromeCollator, "__call__", blind)
    with pytest.raises(GuardError, match="no visual token"):
        train(crome_recipe(eval=None), console=quiet)


def test_validate_builds_it_without_weights(crome_recipe, quiet):
    assert validate(crome_recipe(), quiet) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"type": "pill"}}, "stages.task: is a stage of CROME"),
        ({"method__rnk": 3}, "method.rnk: unknown key; did you mean 'rank'"),
        ({"method__type": "cromme"}, "method"),
        ({"stages__task__train": {"warmup_steps": 5}}, "per_step does not read train.warmup_steps"),
    ],
)
def test_errors(crome_recipe, changes, message):
    with pytest.raises(RecipeError, match=message):
        crome_recipe(**changes)


def test_the_shipped_recipe_is_valid():
    from mmadapt.train import find_recipe, load_recipe

    recipe = load_recipe(find_recipe("crome_digits"))
    assert list(recipe.stages) == ["align", "instruct", "task"]
    assert json.loads(recipe.model_dump_json())["method"]["type"] == "crome"
