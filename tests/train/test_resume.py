"""kill -9 at any moment, the same command again, the same weights bit for bit."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mmadapt.train import load_recipe, train
from mmadapt.train.ui import Console

# Runs the command line with a hook that kills its own process at a chosen moment: an honest
# SIGKILL, without the luck of a timer.
KILLER = textwrap.dedent(
    """
    import os, signal, sys
    from pathlib import Path

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    stage, point, step = sys.argv.pop(1), sys.argv.pop(1), int(sys.argv.pop(1))

    from mmadapt.train import adapters, checkpoints, stages
    from mmadapt.train.trainer import StageTrainer

    def before(owner, name, when):
        original = getattr(owner, name)
        def wrapper(*args, **kwargs):
            if when(*args):
                die()
            return original(*args, **kwargs)
        setattr(owner, name, wrapper)

    def at(trainer):
        return trainer.stage_name == stage and trainer.state.global_step == step

    if point == "training_step":          # between two steps, nothing of this one written
        before(StageTrainer, "training_step", lambda trainer, *a: at(trainer))
    elif point == "optimizer_state":      # weights of the checkpoint written, the rest not
        before(StageTrainer, "_save_optimizer_and_scheduler", lambda trainer, *a: at(trainer))
    elif point == "marker":               # everything written but the marker
        before(checkpoints, "mark_complete",
               lambda path, marker: stage in path.parts and marker.step == step)
    elif point == "pruning":              # two complete checkpoints, the older about to go
        before(checkpoints, "prune", lambda path, keep: path.name == stage
               and (path / f"checkpoint-{step}").exists())
    elif point == "stage_end":            # trained, adapter folder not written
        before(stages, "save_adapter", lambda model, path: stage in path.parts)
    elif point == "manifest":             # adapter folder written, stage not closed
        from mmadapt.train.manifest import Manifest
        before(Manifest, "finish_stage", lambda manifest, name, metrics: name == stage)
    else:
        raise SystemExit(f"unknown point {point}")

    from mmadapt.cli import main
    main()
    """
)

# in the order in which one run passes them
POINTS = [
    ("align", "training_step", 0),
    ("align", "marker", 1),
    ("align", "optimizer_state", 2),
    ("align", "pruning", 3),
    ("align", "training_step", 3),
    ("align", "stage_end", 0),
    ("align", "manifest", 0),
    ("instruct", "training_step", 0),
    ("instruct", "training_step", 3),
    ("instruct", "marker", 4),
    ("instruct", "manifest", 0),
]


@pytest.fixture(scope="module")
def run_killed(tmp_path_factory):
    script = tmp_path_factory.mktemp("killer") / "killer.py"
    script.write_text(KILLER)

    def run(recipe, stage, point, step):
        root = Path(__file__).resolve().parents[2]
        path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
        result = subprocess.run(
            [sys.executable, str(script), stage, point, str(step), "train", str(recipe)],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == -signal.SIGKILL, result.stderr[-2000:]

    return run


def finish(recipe, *overrides):
    return train(load_recipe(recipe, overrides), console=Console(quiet=True)).run_dir


@pytest.fixture
def check(write_recipe, run_killed, tmp_path, adapter_weights, assert_same_weights):
    def killed_runs_end_alike(*points):
        recipe = write_recipe()
        whole = finish(recipe, f"out={tmp_path / 'whole'}")
        for point in points:
            run_killed(recipe, *point)
        resumed = finish(recipe)
        for stage in ("align", "instruct"):
            assert_same_weights(adapter_weights(whole, stage), adapter_weights(resumed, stage))
            steps = [
                json.loads((run / stage / "trainer_state.json").read_text())["global_step"]
                for run in (whole, resumed)
            ]
            assert steps == [4, 4]

    return killed_runs_end_alike


def test_killed_three_times_in_both_stages(check):
    check(
        ("align", "optimizer_state", 2),  # while a checkpoint is being saved
        ("align", "manifest", 0),  # between the stages
        ("instruct", "training_step", 3),  # in the middle of a stage, in its second epoch
    )


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "point", "step"), POINTS)
def test_killed_at(check, stage, point, step):
    check((stage, point, step))


@pytest.mark.slow
def test_killed_at_every_point_in_one_run(check):
    check(*POINTS)
