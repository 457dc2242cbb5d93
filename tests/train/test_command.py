"""`mmadapt train --model DIR` and `mmadapt eval RUN` on a tiny model saved to disk."""

import sys

import pytest

from mmadapt import cli
from mmadapt.models import load_pretrained

SHORT = ["stages.align.train.max_steps=1", "stages.instruct.train.max_steps=1"]


@pytest.fixture
def mmadapt(monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mmadapt", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code

    return run


def test_model_from_a_folder_trains_evaluates_and_reports(
    write_recipe, mmadapt, blip2_dir, tmp_path, capsys
):
    # the recipe makes its own backbone; --model points it at a checkpoint instead
    recipe = write_recipe(
        model={"name": str(tmp_path / "made"), "make": "digits"},
        eval={"max_new_tokens": 2},
    )
    assert mmadapt("train", recipe, *SHORT, "--model", blip2_dir) == 0
    printed = capsys.readouterr().out
    assert "held-out accuracy" in printed
    assert "images blanked" in printed
    assert "text-only accuracy" in printed
    report = tmp_path / "run" / "report.html"
    assert f"report: {report}" in printed
    assert report.exists()
    assert not (tmp_path / "made").exists()

    report.unlink()
    assert mmadapt("eval", tmp_path / "run", "eval.limit=3") == 0
    assert report.exists()


def test_the_adapter_loads_with_peft_alone(write_recipe, blip2_dir, assert_same_weights):
    import peft

    import mmadapt.peft
    from mmadapt.train import load_recipe, train
    from mmadapt.train.ui import Console

    run = train(load_recipe(write_recipe(), SHORT), console=Console(quiet=True)).run_dir
    base = load_pretrained(str(blip2_dir)).model
    model = peft.PeftModel.from_pretrained(base, str(run / "instruct" / "adapter"))
    assert isinstance(model.peft_config["default"], mmadapt.peft.PillConfig)
    from safetensors.torch import load_file

    saved = load_file(run / "instruct" / "adapter" / "adapter_model.safetensors")
    assert_same_weights(saved, peft.get_peft_model_state_dict(model))


def test_unfinished_run_cannot_be_evaluated(write_recipe, mmadapt, tmp_path, capsys):
    recipe = write_recipe(eval=None)
    assert mmadapt("train", recipe, *SHORT, "stages.instruct=null") == 0
    capsys.readouterr()
    assert mmadapt("eval", recipe) == 2
    assert "the recipe has eval: null" in capsys.readouterr().err
    (tmp_path / "run" / "manifest.json").write_text('{"format": 1, "stages": {}}')
    assert mmadapt("eval", recipe, "eval={limit: 3}") == 2
    assert "stage 'align' is not finished" in capsys.readouterr().err
