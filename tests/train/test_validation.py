"""`mmadapt validate`: problems found without weights."""

import pytest

from mmadapt.train import load_recipe, validate
from mmadapt.train.ui import Console
from mmadapt.train.validation import meta_model


def check(path, *overrides):
    return validate(load_recipe(path, overrides), Console(quiet=True))


def test_a_sound_recipe_has_no_problems(write_recipe):
    assert check(write_recipe()) == []


def test_the_model_is_built_without_weights(write_recipe):
    model = meta_model(load_recipe(write_recipe()))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("stages.align.lr.text_expert=0.1", "stages.align.lr.text_expert: this stage trains no"),
        ("stages.instruct.data[0].path=/nowhere", "stages.instruct.data[0]"),
        ("stages.instruct.data[0].image_root=x", "image_root: no option of reader 'scienceqa'"),
        ("model.name=/nowhere", "model.name"),
        ("stages.align.train={bf16: true, fp16: true}", "stages.align.train: "),
    ],
)
def test_problems_are_reported(write_recipe, override, problem):
    assert problem in "\n".join(check(write_recipe(), override))


def test_broken_images_are_found(write_recipe, digits_dir, tmp_path):
    import shutil

    copy = tmp_path / "digits"
    shutil.copytree(digits_dir, copy)
    image = next((copy / "train").rglob("image.png"))
    image.write_bytes(b"not a picture")
    problems = check(
        write_recipe(), f"stages.instruct.data[0].path={copy}", "stages.instruct.data[0].limit=null"
    )
    assert len(problems) == 1
    assert image.parent.name in problems[0]


def test_what_the_recipe_makes_is_not_missed(write_recipe, tmp_path):
    values = [f"model.name={tmp_path / 'later'}", "model.make=digits"]
    values += [f"data.root={tmp_path / 'data'}", "data.make=digits"]
    assert check(write_recipe(), *values) == []
