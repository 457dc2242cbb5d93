"""Two processes run a whole comparison: both take part in training and evaluation."""

import os
import subprocess
import sys

import pytest

from mmadapt.eval import Comparison
from mmadapt.train import dump_recipe


@pytest.mark.slow
@pytest.mark.parametrize("task", ["retrieval", "vqa"])
def test_two_processes(task, recipe, tmp_path):
    wanted = recipe(task, "launch.nproc=2", "launch.cpu=true", "train.num_train_epochs=1")
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(wanted))
    result = subprocess.run(
        [sys.executable, "-m", "mmadapt", "train", str(file)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    found = Comparison.from_json((tmp_path / "run" / "metrics.json").read_text())
    assert [row.name for row in found.rows][1:] == ["frozen model", "full", "lora", "aurora"]
