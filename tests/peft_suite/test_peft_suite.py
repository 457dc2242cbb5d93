"""`run.py` as a test, for `pytest tests/peft_suite`."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_peft_suite_passes():
    """The suite of the installed PEFT, from the package index, passes against our methods."""
    script = Path(__file__).with_name("run.py")
    result = subprocess.run(
        [sys.executable, str(script), "-n", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:]
    print(result.stdout[-2000:])
