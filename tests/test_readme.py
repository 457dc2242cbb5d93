"""The README does what it says: its examples run, its numbers are the records'."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"), ids=["layers", "peft"])
def test_examples_run(code, tmp_path, monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.chdir(tmp_path)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    exec(code, {"model": LlamaForCausalLM(config)})


@pytest.fixture
def update():
    spec = importlib.util.spec_from_file_location("update_readme", ROOT / "docs/update_readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_numbers_are_those_of_the_records(update):
    assert update.main(["--check"]) == 0


def gpu_run(time, gpu="NVIDIA H200", **measured):
    run = {
        "kind": "run",
        "time": time,
        "gpu": gpu,
        "torch": "2.11.0",
        "triton": "3.6.0",
        "ceilings": {"bytes_per_s": 4.2e12, "flops_per_s": 7e14},
    }
    goals = [
        {
            "kind": "goal",
            "suite": suite,
            "case": "8192 x 4096",
            "goal": "forward, over a copy of x",
            "measured": value,
            "bound": 1.65,
            "at_least": False,
            "unit": "x",
            "met": None if value is None else value <= 1.65,
            "aa_spread": 0.012,
        }
        for suite, value in measured.items()
    ]
    return [run, {"kind": "row"}, *goals]


def test_gpu_table_holds_the_newest_measurement_of_every_goal(update, tmp_path):
    def write(name, *runs):
        lines = [json.dumps(row) for run in runs for row in run]
        (tmp_path / name).write_text("\n".join(lines) + "\n")

    assert update.gpu_table(tmp_path) == update.NO_GPU_RECORD
    write("c.jsonl", gpu_run("2026-12-03", gpu=None, adapter=9.0), gpu_run("2026-12-04"))
    assert update.gpu_table(tmp_path) == update.NO_GPU_RECORD
    newest = gpu_run("2026-12-02", adapter=1.5, routed=2.0, gate=None)
    write("a.jsonl", gpu_run("2026-11-30", adapter=3.0), newest)
    write("b.jsonl", gpu_run("2026-12-01", adapter=4.0, block=1.25))
    write("d.jsonl", gpu_run("2026-12-03", adapter=None))
    text = update.gpu_table(tmp_path)
    first, block, second, third = text.splitlines()[2:6]
    nothing = " - | - | - |"
    assert block.startswith("| block |") and "1.25 x" in block
    assert "| adapter | 8192 x 4096 | forward, over a copy of x | 1.50 x |" in first
    assert first.endswith("| ≤ 1.65 x | yes |" + nothing)
    assert second.endswith("| 2.00 x | ≤ 1.65 x | no |" + nothing)
    assert third.endswith("| - | ≤ 1.65 x | not measured |" + nothing)
    assert "4.20 TB/s" in text and "up to 1.2 %" in text
    assert "a.jsonl" in text and "b.jsonl" in text and "d.jsonl" not in text


def test_gpu_table_has_both_backends_in_a_row(update, tmp_path):
    run = gpu_run("2026-12-01", adapter=1.5)
    cuda = run[-1] | {
        "goal": "CUDA: " + run[-1]["goal"],
        "measured": 1.4,
        "bound": 1.3,
        "met": False,
    }
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [*run, cuda])) + "\n")
    rows = [line for line in update.gpu_table(tmp_path).splitlines() if "adapter" in line]
    assert rows == [
        "| adapter | 8192 x 4096 | forward, over a copy of x "
        "| 1.50 x | ≤ 1.65 x | yes | 1.40 x | ≤ 1.3 x | no |"
    ]


def test_linked_files_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for name in re.findall(r"`((?:recipes|bench|docs|tests)/[\w./]+)`", README):
        assert (ROOT / name).exists(), name
