"""Three ways to install, each into an environment of its own that borrows torch from this one."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]

CHECK = """
import re
import sys
from pathlib import Path
import torch
import mmadapt
from mmadapt.ops import swiglu_adapter
from mmadapt.train.recipes import shipped

assert "pill_digits" in shipped()
config = mmadapt.show_config()
assert config["extension"] == "built", config
assert re.match(sys.argv[2], config["cuda_kernels"]), config
where = Path(mmadapt.__file__).resolve()
assert where.is_relative_to(Path(sys.argv[1]).resolve()), where
backends = where.parent / "ops" / "_backends"
for table in ("crossovers.json", "triton/configs/sm_90.json"):
    assert (backends / table).is_file(), table
x, gate, down, up = (torch.randn(s) for s in ((64, 24), (4, 24), (4, 24), (24, 4)))
y = swiglu_adapter(x, gate, down, up, backend="cpu")
expected = swiglu_adapter(x.double(), gate.double(), down.double(), up.double())
assert (y - expected).norm() < 1e-6 * expected.norm()
"""


@pytest.fixture
def sources(tmp_path):
    """A copy of what a clone holds, so that builds do not touch this checkout."""
    copy = tmp_path / "clone"
    copy.mkdir()
    files = ("pyproject.toml", "setup.py", "CMakeLists.txt", "MANIFEST.in", "LICENSE", "README.md")
    for name in files:
        shutil.copy(ROOT / name, copy)
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("mmadapt", "kernels", "csrc", "recipes"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    return copy


@pytest.fixture
def environment(tmp_path):
    """Python of a new environment that sees this one's packages, but not its mmadapt."""
    folder = tmp_path / "env"
    venv.create(folder, with_pip=False)
    borrowed = tmp_path / "borrowed"
    borrowed.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if "mmadapt" not in entry.name:
            (borrowed / entry.name).symlink_to(entry)
    python = folder / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip()
    Path(site, "borrowed.pth").write_text(f"{borrowed}\n")
    return python


def run(*command, cwd=None):
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "MMADAPT_REQUIRE_EXT": "1", "OMP_NUM_THREADS": "2"},
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def pip_install(python, *arguments):
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", *arguments)


HAS_NVCC = shutil.which(os.environ.get("CUDACXX", "nvcc")) is not None
# What show_config() says of the CUDA kernels with MMADAPT_CUDA=AUTO on this machine.
AUTO = r"sm_80, sm_90a, compiled by nvcc \d" if HAS_NVCC else "absent: no nvcc"


def test_wheel(sources, environment, tmp_path, monkeypatch):
    monkeypatch.setenv("MMADAPT_CUDA", "OFF")
    dist = tmp_path / "dist"
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, sources)
    (wheel,) = dist.glob("*.whl")
    (sdist,) = dist.glob("*.tar.gz")
    assert sdist.name.startswith("mmadapt-")
    pip_install(environment, wheel)
    off = "absent: MMADAPT_CUDA=OFF when"
    run(environment, "-c", CHECK, environment.parent.parent, off, cwd=tmp_path)


def test_plain_install(sources, environment, tmp_path):
    pip_install(environment, "--no-build-isolation", sources)
    run(environment, "-c", CHECK, environment.parent.parent, AUTO, cwd=tmp_path)


def test_editable_install(sources, environment, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDACXX", "/nonexistent-nvcc")
    pip_install(environment, "--no-build-isolation", "-e", sources)
    for folder in (tmp_path, sources):
        run(environment, "-c", CHECK, sources, "absent: no nvcc when", cwd=folder)


def test_install_without_a_compiler(sources, environment, tmp_path, monkeypatch):
    monkeypatch.delenv("MMADAPT_REQUIRE_EXT", raising=False)
    monkeypatch.setenv("CXX", "/nonexistent-compiler")
    command = [environment, "-m", "pip", "install", "-v", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", sources]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "mmadapt: the C++ extension was not built" in result.stdout + result.stderr
    code = "import mmadapt; print(mmadapt.show_config()['extension'])"
    assert "absent: not built" in run(environment, "-c", code, cwd=tmp_path)
    code = "import mmadapt; print(mmadapt.show_config()['cuda_kernels'])"
    assert "absent: no extension" in run(environment, "-c", code, cwd=tmp_path)
    monkeypatch.setenv("MMADAPT_REQUIRE_EXT", "1")
    assert subprocess.run(command, capture_output=True).returncode != 0


@pytest.mark.skipif(not HAS_NVCC, reason="needs nvcc")
def test_cuda_kernels_that_do_not_compile(sources, environment, tmp_path, monkeypatch):
    """The rest is built without them, loudly; an error where they were asked for."""
    monkeypatch.delenv("MMADAPT_REQUIRE_EXT", raising=False)
    monkeypatch.setenv("MMADAPT_CUDA_ARCHS", "20-real")  # long gone from nvcc
    command = [environment, "-m", "pip", "install", "-v", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", sources]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "again without the CUDA kernels" in result.stdout + result.stderr
    absent = "absent: they did not compile when"
    run(environment, "-c", CHECK, environment.parent.parent, absent, cwd=tmp_path)
    monkeypatch.setenv("MMADAPT_CUDA", "ON")
    assert subprocess.run(command, capture_output=True).returncode != 0
