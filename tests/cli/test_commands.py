"""The commands that train nothing, through typer's runner."""

import sys

import pytest
import yaml
from typer.testing import CliRunner

from mmadapt import cli

runner = CliRunner()


def invoke(*arguments):
    return runner.invoke(cli.app, list(arguments))


def fails(monkeypatch, capsys, *arguments):
    """Exit code and stderr of the entry point, which turns errors into messages."""
    monkeypatch.setattr(sys, "argv", ["mmadapt", *arguments])
    monkeypatch.delenv("MMADAPT_DEBUG", raising=False)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code, capsys.readouterr().err


def test_ls_names_methods_and_recipes():
    result = invoke("ls")
    assert result.exit_code == 0
    assert "pill_digits" in result.output
    assert "pill_scienceqa" in result.output


def test_cp_writes_a_recipe_that_loads(tmp_path):
    target = tmp_path / "deep" / "mine.yaml"
    assert invoke("cp", "pill_digits", str(target)).exit_code == 0
    assert yaml.safe_load(target.read_text())["method"]["type"] == "pill"
    assert invoke("train", str(target), "--dry-run").exit_code == 0


def test_cp_does_not_overwrite(tmp_path, monkeypatch, capsys):
    target = tmp_path / "mine.yaml"
    target.write_text("mine")
    code, message = fails(monkeypatch, capsys, "cp", "pill_digits", str(target))
    assert code == 2
    assert "exists already; pass --force" in message
    assert target.read_text() == "mine"
    assert invoke("cp", "pill_digits", str(target), "--force").exit_code == 0


def test_env_prints_versions():
    result = invoke("env")
    assert result.exit_code == 0
    for name in ("mmadapt", "python", "torch", "transformers", "peft"):
        assert name in result.output


def test_dry_run_prints_the_resolved_recipe(tmp_path):
    result = invoke("train", "pill_digits", f"out={tmp_path}/r", "method.rank=3", "--dry-run")
    body, _, command = result.output.partition("# ")
    resolved = yaml.safe_load(body)
    assert resolved["method"]["rank"] == 3
    assert resolved["model"]["name"] == f"{tmp_path}/r/backbone"
    assert "-m mmadapt" in command
    assert not (tmp_path / "r").exists()


def test_dry_run_prints_the_launcher_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mmadapt", "train", "pill_digits", "launch.nproc=2"])
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    result = invoke("train", "pill_digits", "launch.nproc=2", "--dry-run")
    line = result.output.splitlines()[-1]
    assert "accelerate.commands.launch --num_processes 2" in line
    assert line.endswith("-m mmadapt train pill_digits launch.nproc=2")


def test_model_option_replaces_the_made_backbone():
    result = invoke("train", "pill_digits", "--model", "some/checkpoint", "--dry-run")
    model = yaml.safe_load(result.output.partition("# ")[0])["model"]
    assert (model["name"], model["make"], model["make_args"]) == ("some/checkpoint", None, {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "pill_digits", "method.rnk=3"), "method.rnk: unknown key; did you mean 'rank'?"),
        (("train", "no_such_recipe"), "the package ships only aurora_digits_retrieval"),
        (("train", "pill_digits", "seed"), "expected key=value"),
        (("eval", "."), "no run directory"),
    ],
)
def test_errors_are_one_message_and_exit_code_2(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, stderr = fails(monkeypatch, capsys, *arguments)
    assert code == 2
    assert stderr.startswith("error: ")
    assert message in stderr
    assert "Traceback" not in stderr


def test_debug_shows_the_traceback(monkeypatch):
    from mmadapt.train import RecipeError

    monkeypatch.setenv("MMADAPT_DEBUG", "")
    monkeypatch.setattr(sys, "argv", ["mmadapt", "--debug", "train", "no_such_recipe"])
    with pytest.raises(RecipeError):
        cli.main()


def test_programming_errors_are_not_hidden(monkeypatch):
    def broken():
        raise KeyError("bug")

    monkeypatch.setattr("mmadapt.train.recipes.shipped", broken)
    monkeypatch.setattr(sys, "argv", ["mmadapt", "ls"])
    with pytest.raises(KeyError):
        cli.main()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ablate", "pill_digits"), "method.type: is pill"),
        (("ablate", "crome_digits", "--only", "gate"), "--only 'gate': expected one of CROME"),
    ],
)
def test_ablate_refuses(monkeypatch, capsys, arguments, message):
    code, stderr = fails(monkeypatch, capsys, *arguments)
    assert code == 2 and message in stderr
