"""Starting a run in several processes through `accelerate launch`."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence

from mmadapt.train.config import LaunchConfig


def is_launched() -> bool:
    """Whether this process was started by accelerate launch or torchrun."""
    return "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def launch_command(launch: LaunchConfig, arguments: Sequence[str]) -> list[str]:
    """The command that runs `mmadapt <arguments>` in `launch.nproc` processes of this machine."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--num_processes", str(launch.nproc), "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--cpu"] if launch.cpu else ["--multi_gpu"]
    return [*command, "-m", "mmadapt", *arguments]


def relaunch(launch: LaunchConfig, arguments: Sequence[str]) -> None:
    """Replace this process by the launcher; does not return."""
    command = launch_command(launch, arguments)
    sys.stdout.flush()
    os.execv(command[0], command)


def shown(command: Sequence[str]) -> str:
    """The command as one line for a shell."""
    return shlex.join(command)
