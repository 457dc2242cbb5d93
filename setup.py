"""Maps `kernels/` to `mmadapt.kernels` and drives CMake; metadata lives in pyproject.toml.

Environment: MMADAPT_REQUIRE_EXT=1 turns a failed build of `mmadapt._C` into an error (by default
the package installs as pure Python and `mmadapt.show_config()` says so). MMADAPT_SKIP_EXT=1 does
not try. For its CUDA part, CMake options of the same names (csrc/cuda/kernels.cmake):
MMADAPT_CUDA=AUTO|ON|OFF (AUTO, the default: where nvcc is found; if it does not compile, the rest
is built without it, unless MMADAPT_REQUIRE_EXT=1), MMADAPT_CUDA_ARCHS, MMADAPT_WERROR_SPILLS,
MMADAPT_NVCC_THREADS. MAX_JOBS limits the compilers that run at once.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CUDA_OPTIONS = (
    "MMADAPT_CUDA",
    "MMADAPT_CUDA_ARCHS",
    "MMADAPT_WERROR_SPILLS",
    "MMADAPT_NVCC_THREADS",
)


def source_hash() -> str:
    """Digest of csrc/, compiled into the extension so that a stale build can be recognised."""
    digest = hashlib.sha256()
    sources = (p for p in (ROOT / "csrc").rglob("*") if p.is_file() and p.suffix != ".pyc")
    for path in sorted(sources):
        digest.update(path.relative_to(ROOT).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def tool(name: str) -> str:
    """Path of a build tool: from the build environment's wheel if there, else from PATH."""
    beside_python = Path(sys.executable).with_name(name)
    found = str(beside_python) if beside_python.exists() else shutil.which(name)
    if found is None:
        raise RuntimeError(f"{name} not found; `pip install {name}`")
    return found


class CMakeBuild(build_ext):
    """Configure and build csrc/ once, straight to where setuptools wants the module."""

    def build_extension(self, ext: Extension) -> None:
        if os.environ.get("MMADAPT_SKIP_EXT") == "1":
            print("mmadapt: MMADAPT_SKIP_EXT=1, installing without the C++ extension")
            return
        options = {name: os.environ[name] for name in CUDA_OPTIONS if os.environ.get(name)}
        cuda = options.get("MMADAPT_CUDA", "AUTO")
        required = os.environ.get("MMADAPT_REQUIRE_EXT") == "1" or cuda == "ON"
        try:
            try:
                self._build(ext, options)
            except subprocess.CalledProcessError as error:
                if required or cuda == "OFF":
                    raise
                print(
                    f"mmadapt: the build failed ({error}); again without the CUDA kernels.\n"
                    "mmadapt: MMADAPT_CUDA=ON or MMADAPT_REQUIRE_EXT=1 makes this an error.",
                    file=sys.stderr,
                )
                without = {"MMADAPT_CUDA": "OFF", "MMADAPT_CUDA_OFF_REASON": "they did not compile"}
                self._build(ext, {**options, **without})
        except (OSError, RuntimeError, ImportError, subprocess.CalledProcessError) as error:
            if required:
                raise
            print(
                f"mmadapt: the C++ extension was not built ({error}).\n"
                "mmadapt: continuing as pure Python; `mmadapt.show_config()` reports the state, "
                "MMADAPT_REQUIRE_EXT=1 makes this an error.",
                file=sys.stderr,
            )

    def _build(self, ext: Extension, options: dict[str, str]) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = Path(self.build_temp).resolve() / "cmake"
        build_dir.mkdir(parents=True, exist_ok=True)
        cmake = tool("cmake")
        configure = [
            cmake,
            f"-S{ROOT}",
            f"-B{build_dir}",
            "-GNinja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DMMADAPT_SOURCE_HASH={source_hash()}",
            f"-DMMADAPT_OUTPUT_DIR={target.parent}",
            f"-DMMADAPT_OUTPUT_NAME={target.name}",
            *(f"-D{name}={value}" for name, value in options.items()),
        ]
        # A cache made in another pip build environment points at files that are gone.
        (build_dir / "CMakeCache.txt").unlink(missing_ok=True)
        subprocess.run(configure, check=True)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run([cmake, "--build", str(build_dir), "--parallel", jobs], check=True)


# `kernels/` itself is no package (see mmadapt/kernels/__init__.py): its packages are listed.
kernel_packages = find_packages("kernels")

setup(
    packages=[
        *find_packages(include=["mmadapt", "mmadapt.*"]),
        *(f"mmadapt.kernels.{name}" for name in kernel_packages),
        "mmadapt.recipes",
    ],
    package_dir={
        **{
            f"mmadapt.kernels.{name}": f"kernels/{name.replace('.', '/')}"
            for name in kernel_packages
        },
        "mmadapt.recipes": "recipes",
    },
    package_data={
        "mmadapt": ["**/*.html", "ops/_backends/*.json", "**/configs/*.json", "py.typed"],
        "mmadapt.recipes": ["*.yaml"],
    },
    # optional: setuptools then tolerates that nothing was built.
    ext_modules=[Extension("mmadapt._C", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
