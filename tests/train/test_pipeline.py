"""A recipe end to end in this process: stages, skipping, changed settings, evaluation."""

import json
from pathlib import Path

import pytest
import torch

from mmadapt.train import RecipeError, RunError, evaluate, load_recipe, train
from mmadapt.train.ui import Console

QUIET = Console(quiet=True)


def run(path, *overrides, **options):
    return train(load_recipe(path, overrides), console=QUIET, **options)


def test_two_stages_leave_adapters_manifest_and_resolved_recipe(write_recipe, adapter_weights):
    path = write_recipe()
    outcome = run(path)
    manifest = json.loads((outcome.run_dir / "manifest.json").read_text())
    assert [s["status"] for s in manifest["stages"].values()] == ["done", "done"]
    align, instruct = manifest["stages"]["align"], manifest["stages"]["instruct"]
    assert align["trainable"].keys() == {"projector", "vision_expert"}
    assert {"gate", "text_expert", "attention_adapter"} <= instruct["trainable"].keys()
    assert align["metrics"]["steps"] == instruct["metrics"]["steps"] == 4
    assert [step for step, _ in align["metrics"]["loss"]] == [1, 2, 3, 4]
    assert torch.__version__.startswith(align["versions"]["torch"].split("+")[0])
    assert load_recipe(outcome.run_dir / "recipe.yaml") == load_recipe(path)

    before, after = adapter_weights(outcome.run_dir, "align"), adapter_weights(outcome.run_dir)
    changed = {key for key in after if not torch.equal(before[key], after[key])}
    assert any("gate" in key for key in changed)
    assert (outcome.run_dir / "align" / "checkpoint-4" / "complete.json").exists()
    assert not (outcome.run_dir / "align" / "checkpoint-3").exists()


def test_the_backbone_stays_as_it_was(write_recipe, blip2_dir):
    from mmadapt.models import load_pretrained
    from mmadapt.train.build import add_adapter
    from mmadapt.train.pipeline import Manifest, _train_stages

    recipe = load_recipe(write_recipe())
    pretrained = load_pretrained(str(blip2_dir))
    frozen = {key: value.clone() for key, value in pretrained.model.state_dict().items()}
    model = add_adapter(pretrained.model, recipe)
    _train_stages(recipe, model, pretrained, Manifest.open(Path(recipe.out)), QUIET)
    restored = model.unload().state_dict()
    assert all(torch.equal(frozen[key], restored[key]) for key in frozen)


def test_same_recipe_gives_the_same_weights(
    write_recipe, tmp_path, adapter_weights, assert_same_weights
):
    path = write_recipe()
    first = run(path, f"out={tmp_path / 'a'}").run_dir
    torch.rand(7)  # the state of the process must not matter
    second = run(path, f"out={tmp_path / 'b'}").run_dir
    assert_same_weights(adapter_weights(first), adapter_weights(second))
    other = run(path, f"out={tmp_path / 'c'}", "seed=2").run_dir
    with pytest.raises(AssertionError):
        assert_same_weights(adapter_weights(first), adapter_weights(other))


def test_finished_stages_are_skipped_and_reloaded(
    write_recipe, tmp_path, adapter_weights, assert_same_weights
):
    path = write_recipe()
    whole = run(path, f"out={tmp_path / 'whole'}").run_dir
    run(path, "stages.instruct=null")
    resumed = run(path).run_dir
    started = json.loads((resumed / "manifest.json").read_text())["stages"]["align"]["started"]
    assert_same_weights(adapter_weights(whole), adapter_weights(resumed))
    run(path)
    stages = json.loads((resumed / "manifest.json").read_text())["stages"]
    assert stages["align"]["started"] == started


def test_changed_settings_are_refused_then_restarted(write_recipe):
    path = write_recipe()
    run_dir = run(path).run_dir
    with pytest.raises(RunError, match=r"stages\.instruct\.lr\.default: 0\.01 -> 0\.02"):
        run(path, "stages.instruct.lr.default=0.02")
    align = (run_dir / "align" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    run(path, "stages.instruct.lr.default=0.02", restart=True)
    manifest = json.loads((run_dir / "manifest.json").read_text())
    assert manifest["stages"]["instruct"]["config"]["stages"]["instruct"]["lr"]["default"] == 0.02
    assert (run_dir / "align" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == align


def test_a_dropped_stage_in_the_directory_is_refused(write_recipe):
    path = write_recipe()
    run(path)
    with pytest.raises(RunError, match="holds stage 'align', which the recipe does not have"):
        run(path, "stages.align=null")


def test_evaluation_and_report(write_recipe):
    settings = {"split": "test", "limit": 6, "max_new_tokens": 3, "batch_size": 4}
    path = write_recipe(eval=settings)
    outcome = run(path, "stages.align.train.max_steps=1", "stages.instruct.train.max_steps=1")
    assert [row.name for row in outcome.results.rows] == ["PILL", "images blanked", "chance"]
    assert outcome.results.rows[0].table.columns["AVG"].total == 6
    assert outcome.results.gate is not None
    assert len(outcome.results.gate.mean_abs) == 2
    assert outcome.report.exists()
    assert {c.stage for c in outcome.results.stages} == {"align", "instruct"}
    again = run(path, "stages.align.train.max_steps=1", "stages.instruct.train.max_steps=1")
    assert again.results == outcome.results
    fewer = evaluate(outcome.run_dir, overrides=["eval.limit=3"], console=QUIET)
    assert fewer.results.rows[0].table.columns["AVG"].total == 3


def test_llava_trains_too(write_recipe, llava_dir):
    outcome = run(write_recipe(backbone=llava_dir))
    assert (outcome.run_dir / "instruct" / "adapter").is_dir()


def test_bf16_checkpointing_and_pill_schedule(write_recipe):
    train_block = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 2,
        "bf16": True,
        "gradient_checkpointing": True,
        "report_to": [],
        "logging_steps": 1,
    }
    path = write_recipe(
        stages__instruct__train=train_block,
        stages__instruct__lr={"default": 0.01, "schedule": "pill", "warmup_epochs": 0.4},
    )
    run_dir = run(path, "stages.align=null").run_dir
    history = json.loads((run_dir / "instruct" / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
    # 5 steps of one epoch: t = 0, .2, .4, .6, .8 epochs, warm-up until .4
    assert rates[:3] == pytest.approx([0.0, 0.005, 0.01])
    assert rates[3] == pytest.approx(0.0075)
    assert rates[4] == pytest.approx(0.0025)


def test_data_errors_name_the_source(write_recipe, tmp_path):
    path = write_recipe()
    with pytest.raises(RecipeError, match=r"stages\.instruct\.data\[0\]"):
        run(path, f"stages.instruct.data[0].path={tmp_path / 'nowhere'}")


def test_unusable_model_is_an_error(write_recipe, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match=r"model\.name: cannot load"):
        run(write_recipe(), f"model.name={tmp_path / 'empty'}")


def test_precision_and_checkpointing_end_with_their_stage(
    write_recipe, tmp_path, adapter_weights, assert_same_weights
):
    """One process for both stages, or one for each: the same weights."""
    special = ["stages.align.train.bf16=true", "stages.align.train.gradient_checkpointing=true"]
    path = write_recipe()
    whole = run(path, *special, f"out={tmp_path / 'whole'}").run_dir
    parts = tmp_path / "parts"
    run(path, *special, f"out={parts}", "stages.instruct=null", "eval=null")
    run(path, *special, f"out={parts}")
    assert_same_weights(adapter_weights(whole), adapter_weights(parts))


def test_another_number_of_processes_is_refused(write_recipe):
    path = write_recipe()
    manifest = run(path).run_dir / "manifest.json"
    content = json.loads(manifest.read_text())
    content["stages"]["align"]["processes"] = 2
    manifest.write_text(json.dumps(content))
    with pytest.raises(RunError, match="'align' was trained by 2 processes, this run has 1"):
        run(path)


def test_evaluation_data_is_looked_at_before_training(write_recipe, tmp_path):
    with pytest.raises(RecipeError, match=r"eval.data: .*no split 'nosuch'"):
        run(write_recipe(), f"out={tmp_path / 'run'}", "eval.split=nosuch")
    assert not (tmp_path / "run" / "align").exists()
