"""The command line as a process of its own."""

import os
import subprocess
import sys
from pathlib import Path


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from typer.testing import CliRunner; from mmadapt.cli import app; "
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0; "
        "print([m for m in ('torch', 'transformers', 'pydantic') if m in sys.modules])"
    )
    root = str(Path(__file__).resolve().parents[2])
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "[]"


def test_error_has_exit_code_2_and_no_traceback(tmp_path, mmadapt_command):
    result = mmadapt_command("train", "pill_digits", "metod.rank=3", cwd=tmp_path)
    assert result.returncode == 2
    assert "metod: unknown key; did you mean 'method'?" in result.stderr
    assert "Traceback" not in result.stderr
