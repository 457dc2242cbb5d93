"""Two CPU processes against one, same global batch: same draws, text-only batches among them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmadapt.train import Console, dump_recipe, train


def losses(run, stage):
    manifest = json.loads((Path(run) / "manifest.json").read_text())
    return [loss for _, loss in manifest["stages"][stage]["metrics"]["loss"]]


@pytest.mark.slow
def test_two_processes_give_the_loss_of_one(crome_recipe, tmp_path):
    """Batches of one sample: a rank without an image still reduces what trains."""
    recipe = crome_recipe(out="one", eval=None)
    for stage in recipe.stages.values():
        stage.train |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
        stage.train |= {"max_steps": 6}
    train(recipe, console=Console(quiet=True))
    file, out = tmp_path / "recipe.yaml", tmp_path / "two"
    file.write_text(dump_recipe(recipe))
    once = [f"stages.{s}.train.gradient_accumulation_steps=1" for s in recipe.stages]
    root = Path(__file__).resolve().parents[3]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "mmadapt",
            "train",
            str(file),
            f"out={out}",
            *once,
            "launch.nproc=2",
        ],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for stage in recipe.stages:
        assert losses(out, stage) == pytest.approx(losses(recipe.out, stage), rel=1e-3), stage
