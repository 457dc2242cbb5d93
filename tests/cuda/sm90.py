"""Compile the CUDA kernels without a GPU, by the project's own build, and look at the result.

    python tests/cuda/sm90.py [--jobs 2] [--json FILE]

Reported per kernel and architecture: registers, stack bytes, spilled bytes (`-Xptxas -v`, kept by
csrc/cuda/ptxas_report.py), and for sources named *_sm90.cu whether their code multiplies by wgmma
(HGMMA in the machine code; a source that means not to says so: `// sm90: no wgmma`). Exit status 1
if a kernel spills or uses stack, or such a source holds no wgmma. Without nvcc there is nothing to
compile: says so, exit status 0. The machine code is read by triton's cuobjdump; without triton that
part is skipped, and said so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "cuda-sm90"


def _load_report() -> Any:
    path = ROOT / "csrc" / "cuda" / "ptxas_report.py"
    spec = importlib.util.spec_from_file_location("ptxas_report", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ptxas_report = _load_report()


class Kernel(NamedTuple):
    source: str
    usage: Any  # ptxas_report.Usage

    @property
    def fault(self) -> str | None:
        u = self.usage
        if u.clean:
            return None
        return (
            f"{self.source}: {plain(u.function)} for {u.architecture}: {u.stack} bytes of stack, "
            f"{u.spill_stores} bytes spilled, {u.spill_loads} read back"
        )


def nvcc() -> str | None:
    return shutil.which(os.environ.get("CUDACXX", "nvcc"))


def cuobjdump() -> Path | None:
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    found = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return found if found.exists() else None


def tool(name: str) -> str:
    beside_python = Path(sys.executable).with_name(name)
    return str(beside_python) if beside_python.exists() else name


def build(folder: Path = BUILD, jobs: int = 2) -> list[Path]:
    """The object of every CUDA source, each with its report beside it."""
    import pybind11

    (folder / "CMakeCache.txt").unlink(missing_ok=True)
    configure = [
        tool("cmake"), f"-S{ROOT}", f"-B{folder}", "-GNinja",
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", "-DMMADAPT_CUDA=ON",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DMMADAPT_OUTPUT_DIR={folder / 'out'}",
    ]  # fmt: skip
    make = [tool("cmake"), "--build", folder, "--target", "cuda_kernels", "--parallel", str(jobs)]
    for command in (configure, make):
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            raise SystemExit(result.stdout + result.stderr)
    sources = {f"{source.name}.o" for source in (ROOT / "csrc" / "cuda").glob("*.cu")}
    objects = sorted(p for p in folder.rglob("*.cu.o") if p.name in sources)
    assert {p.name for p in objects} == sources, sorted(sources)
    return objects


def kernels(objects: list[Path]) -> list[Kernel]:
    found = []
    for path in objects:
        report = path.with_name(path.name + ".ptxas").read_text()
        usages = ptxas_report.parse(report)
        assert usages, f"{path.name}: ptxas described no kernel"
        found += [Kernel(path.name.removesuffix(".o"), usage) for usage in usages]
    return found


def means_wgmma(path: Path) -> bool:
    """Whether the source of an object should multiply by wgmma."""
    source = ROOT / "csrc" / "cuda" / path.name.removesuffix(".o")
    if not source.name.endswith("_sm90.cu"):
        return False
    return "// sm90: no wgmma" not in source.read_text(encoding="utf-8")


def has_wgmma(path: Path, dump: Path) -> bool:
    """Whether the machine code in an object multiplies by wgmma."""
    command = [dump, "-sass", path]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "Function :" in sass, f"{path.name} holds no machine code"
    return re.search(r"\bHGMMA\b", sass) is not None


def plain(mangled: str) -> str:
    """The kernel's name out of a mangled one, with its template arguments left as they are."""
    names = re.findall(r"\d+_GLOBAL__N__\w+?_cu_[0-9a-f]{8}(.+)", mangled)
    rest = names[0] if names else mangled
    start, name = len(rest) - len(rest.removeprefix("_Z").removeprefix("N")), None
    while (match := re.match(r"\d+", rest[start:])) is not None:  # namespaces, then the kernel
        begin = start + match.end()
        start = begin + int(match[0])
        name = rest[begin:start]
    if name is None:
        return rest
    return name + (f" {rest[start:]}" if rest[start:].startswith("I") else "")


def table(found: list[Kernel]) -> str:
    lines = [("source", "arch", "regs", "stack", "spilled", "kernel")]
    for source, u in found:
        spilled = str(u.spill_stores + u.spill_loads)
        name = plain(u.function)[:90]
        lines.append((source, u.architecture, str(u.registers), str(u.stack), spilled, name))
    widths = [max(len(line[i]) for line in lines) for i in range(6)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if nvcc() is None:
        print("skipped: no nvcc here, the CUDA kernels were not compiled")
        return 0
    begin = time.perf_counter()
    objects = build(jobs=arguments.jobs)
    found = kernels(objects)
    faults = [kernel.fault for kernel in found if kernel.fault]
    hopper = [path for path in objects if means_wgmma(path)]
    dump = cuobjdump()
    if dump is None and hopper:
        print("skipped: wgmma was not looked for, triton's cuobjdump is not here")
    elif dump is not None:
        faults += [f"{p.name}: no wgmma in its code" for p in hopper if not has_wgmma(p, dump)]
    if arguments.json:
        rows = [{"source": source} | usage._asdict() for source, usage in found]
        arguments.json.write_text(json.dumps({"kernels": rows, "faults": faults}))
    print(table(found))
    for line in faults:
        print(f"FAULT {line}")
    print(
        f"{len(found)} kernels of {len(objects)} sources, {time.perf_counter() - begin:.0f} s, "
        f"{len(faults)} faults"
    )
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
