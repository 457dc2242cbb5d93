"""Compile the Triton kernels for sm_90 without a GPU, exactly as their launchers would.

    python tests/kernels/sm90.py [CONTRACT...] [--shipped | --slow] [--jobs 2] [--json FILE]

Backends are called with tensors that have shapes and no memory; what they launch is specialised by
Triton's own launch path (signature, constants, 16-byte divisibility, warps, stages) for sm_90 and
compiled, never run. Reported per kernel: registers, stack bytes (where spills go), shared memory,
and whether its products are wgmma (NO: mma.sync). Exit status 1 if a kernel uses stack or too much
shared memory. Run without TRITON_INTERPRET; Triton caches the results (TRITON_CACHE_DIR).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ARCHITECTURE = "sm_90"
MAX_SHARED_BYTES = 232448
"""227 KB: what one program may use on sm_90."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One compiled kernel."""

    problem: str
    name: str
    settings: str
    registers: int
    stack: int
    shared: int
    wgmma: bool
    dots: bool
    detail: str = ""

    @property
    def fault(self) -> str | None:
        found = []
        if self.stack:
            found.append(f"{self.stack} bytes of stack {self.detail}".strip())
        if self.shared > MAX_SHARED_BYTES:
            found.append(f"{self.shared} bytes of shared memory, at most {MAX_SHARED_BYTES}")
        return ", ".join(found) or None


class _Driver:
    """What the launch path asks of a driver before it would run something."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def record_launches() -> list[tuple[Any, Any]]:
    """From now on launches compile and are listed as (JITFunction, compiled kernel)."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    launched: list[tuple[Any, Any]] = []
    driver.set_active(_Driver())
    launch = JITFunction.run

    def run(self, *args, grid, warmup=False, **kwargs):
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        launched.append((self, kernel))
        return kernel

    JITFunction.run = run
    return launched


def compile_problem(problem: Any, launched: list[tuple[Any, Any]]) -> list[Kernel]:
    """Every distinct kernel that the problem launches."""
    launched.clear()
    problem.call()
    distinct = {kernel.hash: (function, kernel) for function, kernel in launched}
    return [_describe(problem.name, function, kernel) for function, kernel in distinct.values()]


def _describe(problem: str, function: Any, kernel: Any) -> Kernel:
    usage = _resource_usage(kernel.asm["cubin"])
    stack = usage["STACK"] + usage["LOCAL"]
    metadata = kernel.metadata
    constants = _constants(function, kernel)
    return Kernel(
        problem,
        function.__name__,
        f"warps={metadata.num_warps} stages={metadata.num_stages} {constants}",
        usage["REG"],
        stack,
        metadata.shared,
        "wgmma.mma_async" in kernel.asm["ptx"],
        "tt.dot" in kernel.asm["ttir"],
        _spills(kernel.asm["ptx"]) if stack else "",
    )


def _constants(function: Any, kernel: Any) -> str:
    """The kernel's integer constants, most of them sizes and tiles."""
    names = [parameter.name for parameter in function.params]
    found = {}
    for path, value in getattr(kernel.src, "constants", {}).items():
        if len(path) == 1 and isinstance(value, bool | int | str):
            found[names[path[0]]] = value
    return " ".join(f"{name}={value}" for name, value in found.items())


def _tool(name: str) -> Path:
    import triton.backends.nvidia

    return Path(triton.backends.nvidia.__file__).parent / "bin" / name


def _resource_usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_tool("cuobjdump"), "-res-usage", file.name]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    line = next(line for line in out.splitlines() if "REG:" in line)
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}


def _spills(ptx: str) -> str:
    """What ptxas says of spills, for kernels that have any."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        for name in ("ptxas", "ptxas-blackwell"):  # which of them knows this PTX varies by version
            command = [_tool(name), "-v", "--gpu-name=sm_90a", file.name, "-o", os.devnull]
            result = subprocess.run(command, capture_output=True, text=True)
            report = result.stdout + result.stderr
            if found := re.search(r"\d+ bytes spill stores, \d+ bytes spill loads", report):
                return f"({found.group()})"
    return ""


QUICK, SHIPPED, WIDE = "quick", "shipped", "wide"


def problems(contracts: list[str] | None = None, extent: str = QUICK) -> list[Any]:
    """The problems of `sm90_problems.py`, each named by contract."""
    spec = importlib.util.spec_from_file_location("sm90_problems", HERE / "sm90_problems.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return [
        p
        for p in module.problems()
        if (p.contract in contracts if contracts else p.contract != "toy")
        and (extent == WIDE or not p.slow or (extent == SHIPPED and p.shipped))
    ]


def _share(
    contracts: list[str] | None, extent: str, share: int, of: int
) -> tuple[list[Kernel], list[str]]:
    """Compile every `of`-th problem; returns kernels and what could not be compiled."""
    launched = record_launches()
    _as_on_the_target()
    kernels, broken = [], []
    for problem in problems(contracts, extent)[share::of]:
        try:
            kernels += compile_problem(problem, launched)
        except Exception as error:  # one problem's failure must not hide the others
            where = "".join(traceback.format_tb(error.__traceback__)[-2:])
            broken.append(f"{problem.name}: {type(error).__name__}: {error}\n{where}")
    return kernels, broken


def _as_on_the_target() -> None:
    """Tile settings are looked up as on the GPU that is compiled for."""
    from mmadapt.ops._backends.triton import _configs

    _configs._architecture = lambda device: ARCHITECTURE


def check(
    contracts: list[str] | None = None, extent: str = QUICK, jobs: int = 2
) -> tuple[list[Kernel], list[str]]:
    """Kernels, and what could not be compiled."""
    if jobs == 1:
        return _share(contracts, extent, 0, 1)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        shares = [pool.submit(_share, contracts, extent, i, jobs) for i in range(jobs)]
        results = [share.result() for share in shares]
    return [k for kernels, _ in results for k in kernels], [b for _, bad in results for b in bad]


def table(kernels: list[Kernel]) -> str:
    lines = [("problem", "kernel", "regs", "stack", "shared", "wgmma", "settings")]
    for k in kernels:
        wgmma = "yes" if k.wgmma else ("NO" if k.dots else "-")
        lines.append(
            (k.problem, k.name, str(k.registers), str(k.stack), str(k.shared), wgmma, k.settings)
        )
    widths = [max(len(line[i]) for line in lines) for i in range(6)]
    return "\n".join(
        "  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[6]])
        for line in lines
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("contracts", nargs="*")
    parser.add_argument(
        "--shipped", action="store_const", dest="extent", const=SHIPPED, default=QUICK,
        help="also every entry of the shipped tables",
    )  # fmt: skip
    parser.add_argument(
        "--slow", action="store_const", dest="extent", const=WIDE, help="also the wide matrix"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("unset TRITON_INTERPRET: interpreted kernels are not compiled")
    import triton

    begin = time.perf_counter()
    kernels, broken = check(arguments.contracts or None, arguments.extent, arguments.jobs)
    if arguments.json:
        rows = [dataclasses.asdict(k) | {"fault": k.fault} for k in kernels]
        arguments.json.write_text(json.dumps({"kernels": rows, "broken": broken}))
    print(table(kernels))
    faults = [f"{k.problem}: {k.name}: {k.fault}" for k in kernels if k.fault]
    for line in (*broken, *faults):
        print(f"FAULT {line}")
    print(
        f"{len(kernels)} kernels for {ARCHITECTURE}, triton {triton.__version__}, "
        f"{time.perf_counter() - begin:.0f} s, {len(broken) + len(faults)} faults"
    )
    return int(bool(broken or faults))


if __name__ == "__main__":
    sys.exit(main())
