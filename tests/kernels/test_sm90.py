"""Every kernel compiles for Hopper without spilling and within its shared memory; no GPU needed.

The work happens in `sm90.py`, in a process of its own, because here Triton may be in its
interpreter; what is compiled stands in `sm90_problems.py`.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not sys.platform.startswith("linux"),
    reason="needs triton",
)
CONTRACTS = ["swiglu_adapter", "cp_linear", "modality_gate", "projected_modality_gate"]


def compiled(tmp_path, *arguments):
    """Exit status, kernels and what could not be compiled."""
    report = tmp_path / "report.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    jobs = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"
    result = subprocess.run(
        [sys.executable, HERE / "sm90.py", *arguments, "--jobs", jobs, "--json", report],
        cwd=HERE.parents[1], env=environment, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert report.exists(), result.stdout + result.stderr
    found = json.loads(report.read_text())
    return result.returncode, found["kernels"], found["broken"]


def check(tmp_path, *arguments):
    code, kernels, broken = compiled(tmp_path, *arguments)
    faults = [f"{k['problem']}: {k['name']}: {k['fault']}" for k in kernels if k["fault"]]
    assert not broken, "\n".join(broken)
    assert not faults, "\n".join(faults)
    assert code == 0
    return kernels


@pytest.mark.parametrize("contract", CONTRACTS)
def test_no_spills_within_shared_memory(contract, tmp_path):
    name = f"mmadapt.ops._backends.triton.{contract}"
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"no {name}")
    assert check(tmp_path, contract)


@pytest.mark.slow
def test_the_wide_matrix(tmp_path):
    assert check(tmp_path, "--slow")


def test_bad_tiles_are_found(tmp_path):
    code, kernels, broken = compiled(tmp_path, "toy")
    assert not broken
    assert code == 1
    by_problem = {k["problem"]: k for k in kernels}
    assert by_problem["toy clean"]["fault"] is None
    assert by_problem["toy clean"]["wgmma"]
    assert "bytes of stack" in by_problem["toy spills"]["fault"]
    assert "shared memory" in by_problem["toy large"]["fault"]
