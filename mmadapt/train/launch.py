"""Starting a run in several processes through `accelerate launch`."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from mmadapt.train.config import LaunchConfig


def is_launched() -> bool:
    """Whether this process was started by accelerate launch or torchrun."""
    return "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def launch_command(launch: LaunchConfig, arguments: Sequence[str]) -> list[str]:
    """The command that runs `mmadapt <arguments>` in `launch.nproc` processes of this machine."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--num_processes", str(launch.nproc), "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += ["--multi_gpu"]  # starts torchrun, on CPUs too; with --cpu it would want mpirun
    return [*command, "-m", "mmadapt", *arguments]


def process_state(launch: LaunchConfig) -> Any:
    """accelerate's PartialState of this process; CPU processes talk through gloo."""
    import torch
    from accelerate import PartialState

    if launch.cpu or not torch.accelerator.is_available():
        # For the states that Trainer and Accelerator make later on.
        os.environ["ACCELERATE_USE_CPU"] = "true"
        return PartialState(cpu=True)
    return PartialState()


def relaunch(launch: LaunchConfig, arguments: Sequence[str]) -> None:
    """Replace this process by the launcher; does not return."""
    command = launch_command(launch, arguments)
    sys.stdout.flush()
    os.execv(command[0], command)


def shown(command: Sequence[str]) -> str:
    """The command as one line for a shell."""
    return shlex.join(command)
