"""Measure tile settings for this GPU: ``python -m mmadapt.ops.tune CONTRACT --out mine.json``.

Nothing is tuned while training: operators read shipped tables, and on a GPU or a size without an
entry a heuristic. This command walks the candidates of every kernel of a contract for the sizes
asked for, and writes what was fastest to a file that ``MMADAPT_TUNED=mine.json`` then puts in front
of the shipped table. Candidates that spill registers, or whose result differs from that of the
settings in force, are dropped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmadapt.ops._backends import load

CONTRACTS = ("swiglu_adapter", "cp_linear")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass
class Target:
    """One kernel's settings for one size: what to run, and which outputs must agree."""

    kernel: str
    dims: dict[str, int]
    candidates: list[dict[str, int]]
    run: Callable[[], Iterable[Tensor]]


def targets(contract: str, sizes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Target]:
    """Everything to tune: asks the contract's Triton backend for its candidates and calls."""
    backend = load(f"mmadapt.ops._backends.triton.{contract}")
    if isinstance(backend, str):
        raise SystemExit(f"the Triton backend of {contract} is {backend}")
    return [
        Target(*target) for size in sizes for target in backend.tuning_targets(size, dtype, "cuda")
    ]


def time_all(target: Target) -> list[tuple[float, dict[str, int]]]:
    """Median microseconds of every candidate that works, the fastest first."""
    from mmadapt.ops._backends.triton._configs import override

    expected = [t.clone() for t in target.run()]
    timed = []
    for config in target.candidates:
        with override({target.kernel: config}):
            try:
                for kernel in _kernels():
                    kernel.device_caches.clear()
                results = list(target.run())
                if spilled := _spilled():
                    print(f"  {config}: {spilled} spill registers, dropped", flush=True)
                    continue
                pairs = zip(results, expected, strict=True)
                worst = max(_difference(a, b) for a, b in pairs)
                if not worst < 0.02:
                    print(f"  {config}: differs by {worst:.3g}, dropped", flush=True)
                    continue
                microseconds = _microseconds(target.run)
            except Exception as error:
                print(f"  {config}: {type(error).__name__}: {str(error)[:100]}", flush=True)
                continue
        timed.append((microseconds, config))
    return sorted(timed, key=lambda pair: pair[0])


def _kernels() -> list:
    """The compiled-on-demand functions of `mmadapt.kernels` that have been imported."""
    from triton.runtime.jit import JITFunction

    modules = [m for name, m in sys.modules.items() if name.startswith("mmadapt.kernels.")]
    return [f for module in modules for f in vars(module).values() if isinstance(f, JITFunction)]


def _spilled() -> int:
    """Registers spilled to memory by the kernels that are loaded now, over all of them."""
    caches = [cache[0] for kernel in _kernels() for cache in kernel.device_caches.values()]
    return sum(loaded.n_spills or 0 for cache in caches for loaded in cache.values())


def _microseconds(run: Callable[[], object], calls: int = 10, replays: int = 9) -> float:
    """Median over replays of a CUDA graph of `calls` runs: several launches, no gaps between."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    times = []
    for _ in range(replays + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / calls)
    return statistics.median(times[1:])


def _difference(actual: Tensor, expected: Tensor) -> float:
    if expected.numel() == 0:
        return 0.0
    norm = expected.float().norm().item()
    distance = (actual.float() - expected.float()).norm().item()
    return distance / norm if norm else distance


def compile_all(work: list[Target], part: int, parts: int) -> None:
    """Fill Triton's on-disk cache with every `parts`-th candidate; errors show up when timing."""
    from mmadapt.ops._backends.triton._configs import override

    jobs = [(target, config) for target in work for config in target.candidates]
    for target, config in jobs[part::parts]:
        with override({target.kernel: config}):
            try:
                list(target.run())
            except Exception:
                continue


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mmadapt.ops.tune", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("contract", choices=CONTRACTS)
    parser.add_argument(
        "--sizes", required=True, help="tokens x width x rank, e.g. 8192x4096x32,2048x4096x32"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--only", help="only kernels whose name contains this")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; entries are merged in")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--show", type=int, default=3, help="how many candidates to print")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("tuning needs a CUDA device")
    sizes = [tuple(int(n) for n in size.split("x")) for size in arguments.sizes.split(",")]
    if any(len(size) != 3 or min(size) < 1 for size in sizes):
        parser.error(f"--sizes: expected AxBxC with positive numbers, got {arguments.sizes}")
    work = targets(arguments.contract, sizes, DTYPES[arguments.dtype])
    work = [target for target in work if (arguments.only or "") in target.kernel]
    if arguments.part is not None:
        compile_all(work, arguments.part, arguments.jobs)
        return 0
    command = [sys.executable, "-m", "mmadapt.ops.tune", *(argv or sys.argv[1:])]
    workers = [
        subprocess.Popen([*command, "--part", str(part)], stdout=subprocess.DEVNULL)
        for part in range(arguments.jobs)
    ]
    for worker in workers:
        worker.wait()
    found = []
    for target in work:
        timed = time_all(target)
        print(f"{target.kernel} {target.dims}", flush=True)
        for microseconds, config in timed[: arguments.show]:
            print(f"  {microseconds:8.1f} us  {config}", flush=True)
        if timed and math.isfinite(timed[0][0]):
            found.append(
                {
                    "kernel": target.kernel,
                    "dtype": arguments.dtype,
                    "dims": target.dims,
                    "config": timed[0][1],
                    "microseconds": round(timed[0][0], 2),
                }
            )
    write(arguments.out, found)
    print(f"{len(found)} entries in {arguments.out}")
    return 0


def write(path: Path, found: list[dict]) -> None:
    """Merge entries into a table; of the same kernel, dtype and size the new one stays."""
    major, minor = torch.cuda.get_device_capability()
    architecture = f"sm_{major}{minor}"
    table = {"architecture": architecture, "entries": []}
    if path.is_file():
        table = json.loads(path.read_text(encoding="utf-8"))
        if table["architecture"] != architecture:
            raise SystemExit(f"{path} holds {table['architecture']}, this GPU is {architecture}")

    def key(entry: dict) -> tuple:
        return entry["kernel"], entry["dtype"], tuple(sorted(entry["dims"].items()))

    merged = {key(entry): entry for entry in [*table["entries"], *found]}
    table["entries"] = [merged[k] for k in sorted(merged)]
    table["gpu"] = torch.cuda.get_device_name()
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
