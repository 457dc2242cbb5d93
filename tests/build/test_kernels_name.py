"""The folder kernels/ must never answer to Hugging Face's package name `kernels`."""

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROBE = """
import importlib.util, sys
import mmadapt
spec = importlib.util.find_spec("kernels")
print("spec:", spec and spec.origin)
from mmadapt.kernels.swiglu_adapter import reference
print("formula:", reference.swiglu_adapter.__module__)
"""

TRANSFORMERS_PROBE = """
from transformers.utils import is_kernels_available
print("available:", is_kernels_available())
"""


def run(code, folder):
    # `python -c` puts the working directory first on sys.path, as `python -m pytest` does.
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
    ).stdout


def hugging_face_kernels_installed():
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def test_find_spec_is_the_same_from_the_checkout_as_from_elsewhere(tmp_path):
    here, elsewhere = run(PROBE, ROOT), run(PROBE, tmp_path)
    assert here == elsewhere
    assert "formula: mmadapt.kernels.swiglu_adapter.reference" in here
    if not hugging_face_kernels_installed():
        assert "spec: None" in here


def test_hidden_in_this_very_process():
    spec = importlib.util.find_spec("kernels")
    assert spec is None or ROOT not in Path(spec.origin or ROOT).resolve().parents


@pytest.mark.parametrize("first", ["", "import mmadapt\n"])
def test_transformers_answers_the_same_from_the_checkout(tmp_path, first):
    pytest.importorskip("transformers")
    code = first + TRANSFORMERS_PROBE
    assert run(code, ROOT) == run(code, tmp_path)


def test_the_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_guard_leaves_other_modules_of_the_checkout_alone():
    code = "import mmadapt, importlib.util; print(importlib.util.find_spec('bench').origin)"
    assert run(code, ROOT).strip() == str(ROOT / "bench" / "__init__.py")
