"""The Hopper kernels of swiglu_adapter as a library for the CPU: their sources, compiled by g++.

A copy of csrc/cuda is laid out in which the few files that hold instructions of the GPU, most of
hopper/ and store_word.cuh, are replaced by those beside this one, which call into machine/. All
else is compiled as it is: kernels, launchers, choice of tiles, tensor maps.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"
REPLACED = [*sorted((HERE / "hopper").glob("*.cuh")), HERE / "store_word.cuh"]
MACHINE = sorted((HERE / "machine").glob("*.cpp"))
# Libraries of several builds live in one process and share nothing: no unique symbols.
FLAGS = ["-std=c++17", "-fPIC", "-fno-gnu-unique", "-mf16c", "-fno-strict-aliasing"]
FLAGS += ["-ffp-contract=off"]

Edit = tuple[str, str, str]
"""File below csrc/cuda, a text that it holds once, another in its place."""

# Every type and tile takes time to compile: edits for builds that need few of them.
WITHOUT_FP16: Edit = (
    "swiglu_adapter/launch.cuh",
    ": launch_type<__half, BACKWARD>(a, p, rows);",
    ': bad_argument("dtype: this build has bf16 alone");',
)
FROM_72_RANKS: Edit = (
    "swiglu_adapter/launch.cuh",
    """  if (p.rank <= 32) return launch_rank<T, 32, BACKWARD>(a, p, rows);
  if (p.rank <= 64) return launch_rank<T, 64, BACKWARD>(a, p, rows);
""",
    '  if (p.rank <= 64) return bad_argument("rank: this build begins at 72");',
)


def missing() -> str | None:
    """Why the kernels cannot be emulated here."""
    if platform.machine() not in ("x86_64", "AMD64") or platform.system() != "Linux":
        return "the emulation switches stacks as x86-64 Linux does"
    if shutil.which("g++") is None:
        return "needs g++"
    flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].split("\n", 1)[0].split()
    return None if "f16c" in flags else "needs a CPU with F16C"


def lay_out(folder: Path, edits: tuple[Edit, ...] = ()) -> Path:
    """The sources as they are compiled; csrc/cuda within `folder`."""
    shutil.copytree(CSRC, folder, ignore=shutil.ignore_patterns("cpu*"))
    cuda = folder / "cuda"
    for path in REPLACED:
        target = cuda / path.relative_to(HERE)
        assert target.exists(), f"{target.name} replaces nothing"
        shutil.copyfile(path, target)
    for name, text, other in edits:
        source = (cuda / name).read_text(encoding="utf-8")
        assert source.count(text) == 1, f"{name}: expected once: {text}"
        (cuda / name).write_text(source.replace(text, other), encoding="utf-8")
    return cuda


def compile_one(source: Path, output: Path, *options: str) -> Path:
    command = ["g++", *FLAGS, *options, f"-I{HERE / 'machine'}", f"-I{HERE / 'cuda'}"]
    command += ["-x", "c++", "-c", str(source), "-o", str(output)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{source.name}:\n{result.stderr[-4000:]}"
    return output


def build_machine(folder: Path) -> list[Path]:
    """Its objects, compiled if they are not there."""
    objects = [folder / f"{source.stem}.o" for source in MACHINE]
    if not all(path.exists() for path in objects):
        folder.mkdir(parents=True, exist_ok=True)
        for source, path in zip(MACHINE, objects, strict=True):
            compile_one(source, path, "-O2", "-Wall", "-Wextra")
    return objects


def build(
    folder: Path,
    machine: list[Path],
    directions: tuple[str, ...] = ("forward", "dx"),
    edits: tuple[Edit, ...] = (),
) -> Path:
    """The library of `directions`, from edited sources; compiled if it is not there."""
    library = folder / "kernels.so"
    if library.exists():
        return library
    shutil.rmtree(folder, ignore_errors=True)
    cuda = lay_out(folder / "csrc", edits)
    objects = [
        compile_one(
            cuda / f"swiglu_adapter_{direction}_sm90.cu",
            folder / f"{direction}.o",
            *("-O1", "-w", f"-I{folder / 'csrc' / 'include'}", f"-I{cuda}"),
        )
        for direction in directions
    ]
    command = ["g++", "-shared", "-o", str(library), *map(str, [*machine, *objects])]
    subprocess.run(command, check=True)
    return library
