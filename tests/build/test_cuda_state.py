"""The CUDA part of the extension on a machine without a GPU: it loads, and says what it is.

The other states (no nvcc, no compiler, nvcc that fails) are built by test_install.py.
"""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mmadapt
from mmadapt._extension import load_extension

ROOT = Path(__file__).resolve().parents[2]
MODULE, _ = load_extension()
HAS_CUDA = MODULE is not None and hasattr(MODULE, "cuda")
needs_kernels = pytest.mark.skipif(not HAS_CUDA, reason="the extension has no CUDA kernels")


def test_show_config_names_the_state():
    line = mmadapt.show_config(io.StringIO())["cuda_kernels"]
    if HAS_CUDA:
        info = MODULE.build_info()
        assert re.fullmatch(r"sm_\S+(, \S+)*, compiled by nvcc \d+\.\d+\S*", line)
        assert line.endswith(info["nvcc"]) and info["cuda_archs"].split()[0] in line
    else:
        assert line.startswith("absent: ")


@needs_kernels
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_launch_without_a_gpu_is_a_clean_exception():
    launch = MODULE.cuda.modality_gate_forward
    arguments = {
        "tokens": 8192, "heads": 4, "size": 8, "dtype": 1, "logits_dtype": 0, "per_token": 0,
        "value": 0x1000, "logits": 0x2000, "mask": 0x3000, "y": 0x4000, "saved": 0, "stream": 0,
    }  # fmt: skip
    with pytest.raises(RuntimeError) as caught:
        launch(**arguments)
    assert re.fullmatch(
        r"mmadapt\._C\.cuda\.modality_gate_forward: CUDA error \d+ \(cudaError\w+\): .+; at the "
        r"launch of modality_gate_forward_kernel with tokens=8192, heads=4, size=8, dtype=1, "
        r"logits_dtype=0, per_token=0, value=0x1000, logits=0x2000, mask=0x3000, y=0x4000, "
        r"saved=0x0, stream=0x0",
        str(caught.value),
    )
    with pytest.raises(RuntimeError, match="CUDA error"):  # and again, by position
        launch(*arguments.values())


@needs_kernels
def test_bad_arguments_are_named_with_their_values():
    with pytest.raises(ValueError, match=r"tokens: expected 0 to 2\^31 - 1; called with tokens=-1"):
        MODULE.cuda.modality_gate_forward(-1, *[0] * 11)


@needs_kernels
def test_the_module_links_neither_driver_nor_runtime():
    """It must load where there is no driver, and beside whatever runtime torch brings.

    Loaded alone, since torch may bring both."""
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('_C', {MODULE.__file__!r})\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
        "print(open('/proc/self/maps').read())"
    )
    command = [sys.executable, "-c", code]
    maps = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "_C." in maps
    assert "libcudart" not in maps and "libcuda.so" not in maps


@pytest.fixture
def configure(tmp_path):
    """CMake's answer to a set of options."""
    pybind11 = pytest.importorskip("pybind11")

    def run(nvcc=None, **options):
        beside = Path(sys.executable).with_name("cmake")
        command = [str(beside) if beside.exists() else "cmake", f"-S{ROOT}", f"-B{tmp_path}"]
        command += [f"-DPython_EXECUTABLE={sys.executable}"]
        command += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DMMADAPT_OUTPUT_DIR={tmp_path}"]
        command += [f"-D{name}={value}" for name, value in options.items()]
        environment = {**os.environ, **({"CUDACXX": nvcc} if nvcc else {})}
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    return run


@pytest.mark.slow
def test_options_are_checked(configure):
    result = configure(MMADAPT_CUDA="maybe")
    assert result.returncode != 0
    assert "MMADAPT_CUDA is 'maybe', expected AUTO, ON or OFF" in result.stderr
    result = configure("/nonexistent-nvcc", MMADAPT_CUDA="ON")
    assert result.returncode != 0 and "MMADAPT_CUDA=ON: no nvcc" in result.stderr


@pytest.mark.slow
@needs_kernels
def test_native_is_no_architecture(configure):
    result = configure(MMADAPT_CUDA="AUTO", MMADAPT_CUDA_ARCHS="native")
    assert result.returncode != 0
    assert "MMADAPT_CUDA_ARCHS has 'native', expected entries such as" in " ".join(
        result.stderr.split()
    )
