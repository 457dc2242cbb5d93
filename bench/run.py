"""The GPU benchmarks: `python -m bench.run SUITE... [options]`.

Suites: adapter, routed, gate, cp_linear, and goals (the cases of the project's goals, each with its
measured ratio, bound and verdict). A row is timed only after its results pass the correctness gate
(`bench.gate`) on the tensors that are timed. The first record of a run holds the machine, versions,
commit and measured ceilings; records are appended to <out>/<date>-<gpu>-<commit>.jsonl.

    python -m bench.run adapter --shapes 8192x4096x32,8192x4096x64 --providers eager,triton
    python -m bench.run goals --no-compile --out results --commit abc1234

Activations and incoming gradients are rotated over clones of more than 3 x L2; weights, expert ids
and masks are the same tensors in every call, as in training.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bench import machine as machines
from bench import timing
from bench.case import KINDS, Case
from bench.measure import Settings, measure, release
from bench.report import Record, table

SUITES = ("adapter", "routed", "gate", "cp_linear")
RESULTS = Path(__file__).resolve().parent / "results"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def suite(name: str) -> ModuleType:
    return importlib.import_module(f"bench.cases.{name}")


def shapes(text: str) -> list[tuple[int, ...]]:
    """`8192x4096x32,2048x4096x32` as tuples."""
    found = [tuple(int(n) for n in item.split("x")) for item in text.split(",")]
    if any(len(shape) != 3 or min(shape) < 1 for shape in found):
        raise argparse.ArgumentTypeError(f"expected AxBxC with positive numbers, got {text!r}")
    return found


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("suites", nargs="+", choices=[*SUITES, "goals"], metavar="SUITE")
    p.add_argument("--shapes", type=shapes, help="replaces each suite's own; gate: TxHxh")
    p.add_argument("--variants", type=names, help="e.g. plain,norm-fp32; see bench/cases")
    p.add_argument("--providers", type=names, help="only these, and copy and frozen-gemm")
    p.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    p.add_argument("--dtype", choices=DTYPES, default="bf16")
    p.add_argument("--mode", choices=timing.MODES, default=timing.GRAPH)
    p.add_argument("--passes", type=names, default=list(KINDS), help=" or ".join(KINDS))
    p.add_argument("--rounds", type=int, default=30)
    p.add_argument("--warmup-ms", type=float, default=200.0)
    p.add_argument("--no-launches", action="store_true", help="do not count launches (profiler)")
    p.add_argument("--out", type=Path, default=RESULTS)
    p.add_argument("--commit", help=f"where there is no git; or {machines.COMMIT_VARIABLE}")
    p.add_argument("--device", default="cuda", help="cpu only tries the harness itself")
    return p


def cases(arguments: argparse.Namespace, device: torch.device):
    """Builders of the named suites' cases, so that only one case is in memory at a time."""
    for name in arguments.suites:
        if name == "goals":
            continue
        module = suite(name)
        for shape in arguments.shapes or module.SHAPES:
            for variant in arguments.variants or module.DEFAULT_VARIANTS:
                if variant in module.VARIANTS:
                    yield lambda m=module, s=shape, v=variant: m.build(
                        s, v, DTYPES[arguments.dtype], device
                    )


def run(case: Case, machine: dict[str, Any], settings: Settings, record: Record) -> list[dict]:
    """Measure, record and print one case."""
    begin = time.perf_counter()
    rows = measure(case, machine, settings)
    record.write(*rows)
    print(f"\n{table(rows)}\n  ({time.perf_counter() - begin:.1f} s)", flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    unknown = set(arguments.passes) - set(KINDS)
    if unknown:
        raise SystemExit(f"--passes: {', '.join(unknown)}; expected {' or '.join(KINDS)}")
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; --device cpu --mode eager-call tries the harness")
    if device.type == "cpu" and arguments.mode == timing.GRAPH:
        raise SystemExit("graph-cold needs a GPU; use --mode eager-call on the CPU")
    settings = Settings(
        mode=arguments.mode,
        rounds=arguments.rounds,
        warmup_seconds=arguments.warmup_ms * 1e-3,
        providers=arguments.providers,
        compile=not arguments.no_compile,
        kinds=arguments.passes,
        count_launches=not arguments.no_launches,
    )
    machine = machines.describe(device, arguments.commit)
    record = Record(arguments.out, machine)
    record.write(machine)
    ceilings = machine["ceilings"]
    print(
        f"{machine['gpu'] or 'CPU'}, torch {machine['torch']}, triton {machine['triton']}, "
        f"{machine['commit']}{' (dirty)' if machine['dirty'] else ''}: copy "
        f"{ceilings['bytes_per_s'] * 1e-12:.2f} TB/s, bf16 product "
        f"{ceilings['flops_per_s'] * 1e-12:.0f} TFLOP/s",
        flush=True,
    )
    failed = False
    for build in cases(arguments, device):
        rows = run(build(), machine, settings, record)
        failed |= any("failed" in row for row in rows)
        release()
    if "goals" in arguments.suites:
        from bench import goals

        failed |= goals.run(machine, settings, record, device)
    print(f"\nrecord: {record.path}")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
