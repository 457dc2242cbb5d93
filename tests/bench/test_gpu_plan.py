"""Every command of bench/gpu.sh is one that its suite accepts."""

import importlib
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from bench import run

SCRIPT = Path(run.__file__).with_name("gpu.sh")


def commands(*parts, out=""):
    environment = os.environ | {"PY": "echo", "OUT": out}
    found = subprocess.run(
        ["sh", str(SCRIPT), *parts], capture_output=True, text=True, env=environment
    )
    lines = [line for line in found.stdout.splitlines() if line.startswith("-m ")]
    return found.returncode, [shlex.split(line)[1:] for line in lines]


def test_every_command_is_accepted(tmp_path):
    code, found = commands("all", "subset", "autotuned", out=str(tmp_path))
    assert code == 0
    assert len(found) > 15
    for module, *arguments in found:
        suite = importlib.import_module(module)
        parsed = suite.parser().parse_args(arguments)
        assert parsed.out == tmp_path
        if suite is run and parsed.suites != ["goals"]:
            planned = run.plan(parsed, torch.device("cuda"))
            assert planned
            assert len(planned) == len({(p.module, p.shape, p.variant) for p in planned})


def test_providers_of_the_plan_exist():
    for module, *arguments in commands("all", "autotuned")[1]:
        if module != "bench.run":
            continue
        parsed = run.parser().parse_args(arguments)
        for name in parsed.suites if parsed.providers else ():
            small = {"adapter": (8, 8, 4), "routed": (8, 8, 4)}[name]
            case = run.suite(name).build(small, "norm", torch.bfloat16, torch.device("cpu"))
            assert set(parsed.providers) & case.providers.keys()


def test_an_unknown_part_fails():
    assert commands("nonsense") == (1, [])


def test_the_readme_names_every_part():
    text = SCRIPT.with_name("README.md").read_text(encoding="utf-8")
    source = SCRIPT.read_text(encoding="utf-8")
    parts = [line.split(")")[0].strip() for line in source.splitlines() if line[:8].isspace()]
    names = [p for p in parts if p.replace("-", "").isalpha() and p in source]
    listed = [name for name in names if f"        {name})" in source]
    assert len(listed) > 10
    for name in listed:
        if name != "overhead-all":
            assert f"`{name}`" in text, name


@pytest.mark.parametrize("part", ["subset"])
def test_no_out_without_being_asked(part):
    assert all("--out" not in command for command in commands(part)[1])
