import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def mmadapt_command():
    """Runs `python -m mmadapt ...` in a process of its own, from another directory."""

    def run(*arguments, cwd, timeout=300):
        root = Path(__file__).resolve().parents[2]
        path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
        return subprocess.run(
            [sys.executable, "-m", "mmadapt", *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run
