"""Stages are skipped only under the settings they were trained with."""

import pytest

from mmadapt.train import RunError, find_recipe, load_recipe
from mmadapt.train.manifest import Manifest, config_hash, evaluation_identity, stage_identity


def recipe(*overrides):
    return load_recipe(find_recipe("pill_digits"), overrides)


def digest(stage, *overrides):
    return config_hash(stage_identity(recipe(*overrides), stage))


@pytest.mark.parametrize(
    "override",
    [
        "stages.align.train.logging_steps=3",
        "stages.align.train.save_steps=7",
        "stages.align.train.dataloader_num_workers=2",
        "launch.nproc=2",
        "eval.limit=3",
    ],
)
def test_cosmetic_settings_keep_the_stage(override):
    assert digest("align", override) == digest("align")


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "method.rank=3",
        "model.dtype=bfloat16",
        "stages.align.lr.default=0.1",
        "stages.align.train.max_steps=3",
        "stages.align.data[0].limit=9",
    ],
)
def test_settings_the_weights_depend_on(override):
    assert digest("align", override) != digest("align")
    assert digest("instruct", override) != digest("instruct")


def test_a_later_stage_does_not_touch_an_earlier_one():
    assert digest("align", "stages.instruct.lr.default=0.1") == digest("align")
    assert digest("instruct", "stages.instruct.lr.default=0.1") != digest("instruct")


def test_life_of_a_stage(tmp_path):
    manifest = Manifest.open(tmp_path)
    manifest.check_stage(recipe(), "align")
    manifest.start_stage(recipe(), "align", {"versions": {"torch": "x"}})
    assert not manifest.is_done("align")
    started = manifest.stage("align")["started"]
    again = Manifest.open(tmp_path)
    again.start_stage(recipe(), "align", {"versions": {"torch": "other"}})
    assert again.stage("align")["started"] == started
    again.finish_stage("align", {"steps": 3})
    assert Manifest.open(tmp_path).is_done("align")
    assert Manifest.open(tmp_path).stage("align")["metrics"] == {"steps": 3}


def test_changed_settings_are_named(tmp_path):
    manifest = Manifest.open(tmp_path)
    manifest.start_stage(recipe(), "align", {})
    with pytest.raises(RunError) as caught:
        manifest.check_stage(recipe("stages.align.lr.default=0.1", "seed=5"), "align")
    message = str(caught.value)
    assert f"stages.align.lr.default: {recipe().stages['align'].lr.default} -> 0.1" in message
    assert "seed: 0 -> 5" in message
    assert "--restart" in message


def test_evaluation_is_kept_for_its_settings(tmp_path):
    manifest = Manifest.open(tmp_path)
    manifest.finish_evaluation(recipe(), {"report": "report.html"})
    assert manifest.evaluation(recipe())["report"] == "report.html"
    assert manifest.evaluation(recipe("eval.limit=3")) is None
    assert evaluation_identity(recipe("eval=null"))["eval"] is None


def test_broken_manifest_is_an_error(tmp_path):
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(RunError, match="not valid JSON"):
        Manifest.open(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(RunError, match="format 99"):
        Manifest.open(tmp_path)
