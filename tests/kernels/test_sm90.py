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


def faults_of(kernels):
    return [f"{k['problem']}: {k['name']}: {k['fault']}" for k in kernels if k["fault"]]


def test_no_spills_within_shared_memory_and_bad_tiles_are_found(tmp_path):
    """One run for everything: a process takes seconds to import torch and Triton."""
    code, kernels, broken = compiled(tmp_path, *CONTRACTS, "toy")
    assert not broken, "\n".join(broken)
    toys = {k["problem"]: k for k in kernels if k["problem"].startswith("toy ")}
    ours = [k for k in kernels if k["problem"] not in toys]
    assert not faults_of(ours), "\n".join(faults_of(ours))
    assert {k["problem"].split()[0] for k in ours} == set(CONTRACTS)
    assert code == 1  # for the toys' sake
    assert toys["toy clean"]["fault"] is None
    assert toys["toy clean"]["wgmma"]
    assert "bytes of stack" in toys["toy spills"]["fault"]
    assert "shared memory" in toys["toy large"]["fault"]


@pytest.mark.slow
def test_the_wide_matrix(tmp_path):
    code, kernels, broken = compiled(tmp_path, "--slow")
    assert not broken, "\n".join(broken)
    assert kernels and not faults_of(kernels), "\n".join(faults_of(kernels))
    assert code == 0
