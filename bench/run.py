"""Operators and blocks: `python -m bench.run SUITE... [options]`.

Suites: adapter, routed, gate, cp_linear; block (a LLaMA layer with PILL) and vit_block (a BLIP ViT
layer with Aurora); and goals (the cases of the project's goals, each with its measured ratio, bound
and verdict). A row is timed only after its results pass the correctness gate (`bench.gate`) on the
tensors that are timed. The first record of a run holds the machine, versions, commit and measured
ceilings; records are appended to <out>/<date>-<gpu>-<commit>.jsonl. What fails is recorded and the
run goes on; the exit status is 1 if anything failed.

    python -m bench.run adapter --shapes 8192x4096x32,8192x4096x64 --providers eager,triton
    python -m bench.run adapter routed --grid subset --no-compile --passes forward,backward
    python -m bench.run block --mode eager-call
    python -m bench.run goals --no-compile --out results --commit abc1234

On a machine without a GPU the same command measures the CPU backends, by the host's clock
(`eager-call`); `--mode graph-cold` is refused there.

Activations and incoming gradients are rotated over clones of more than 3 x L2; weights, expert ids
and masks are the same tensors in every call, as in training.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bench import machine as machines
from bench import timing
from bench.case import ALL_KINDS, KINDS, Case
from bench.measure import Settings, measure, release
from bench.report import Record, table

SUITES = ("adapter", "routed", "gate", "cp_linear", "block", "vit_block")
RESULTS = Path(__file__).resolve().parent / "results"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def suite(name: str) -> ModuleType:
    return importlib.import_module(f"bench.cases.{name}")


def shapes(text: str) -> list[tuple[int, ...]]:
    """`8192x4096x32,2048x4096x32` as tuples."""
    try:
        found = [tuple(int(n) for n in item.split("x")) for item in text.split(",")]
    except ValueError:
        found = [()]
    if any(len(shape) not in (3, 4) or min(shape) < 1 for shape in found):
        raise argparse.ArgumentTypeError(f"expected AxBxC or AxBxCxD, positive, got {text!r}")
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
    p.add_argument("--grid", default="default", help="named shapes: subset, tokens, heat, full")
    p.add_argument("--variants", type=names, help="e.g. plain,norm-fp32; see bench/cases")
    p.add_argument("--providers", type=names, help="only these, and copy and frozen-gemm")
    p.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    p.add_argument("--max-autotune", action="store_true", help="add compile-max; minutes a case")
    p.add_argument("--dtype", choices=DTYPES, default="bf16")
    p.add_argument("--mode", choices=timing.MODES, help="default: graph-cold on a GPU")
    p.add_argument(
        "--passes",
        type=names,
        default=list(KINDS),
        help=f"of {', '.join(ALL_KINDS)}; default {','.join(KINDS)}",
    )
    p.add_argument("--rounds", type=int, default=30)
    p.add_argument("--warmup-ms", type=float, default=200.0)
    p.add_argument("--no-launches", action="store_true", help="do not count launches (profiler)")
    p.add_argument("--out", type=Path, default=RESULTS)
    p.add_argument("--commit", help=f"where there is no git; or {machines.COMMIT_VARIABLE}")
    p.add_argument("--device", help="default: cuda where there is one")
    p.add_argument("--budget-s", type=float, help="start no further case after so many seconds")
    return p


@dataclass(frozen=True)
class Planned:
    """A case to be built when its turn comes, so that only one is in memory at a time."""

    module: ModuleType
    shape: tuple[int, ...]
    variant: str
    dtype: torch.dtype
    device: torch.device

    def build(self) -> Case:
        return self.module.build(self.shape, self.variant, self.dtype, self.device)


def plan(arguments: argparse.Namespace, device: torch.device) -> list[Planned]:
    """Every suite's shapes and variants; SystemExit for what no suite has."""
    modules = [suite(name) for name in arguments.suites if name != "goals"]
    for variant in arguments.variants or ():
        if modules and not any(_has(module, variant) for module in modules):
            reasons = "; ".join(_refusal(module, variant) for module in modules)
            raise SystemExit(f"--variants: {reasons}")
    found = []
    for module in modules:
        grid = module.GRIDS.get(arguments.grid)
        if grid is None and not arguments.shapes:
            raise SystemExit(f"--grid: {module.__name__} has {', '.join(module.GRIDS)}")
        for shape in arguments.shapes or grid:
            if len(shape) not in module.LENGTHS:
                raise SystemExit(
                    f"--shapes: {module.__name__} takes "
                    f"{' or '.join(map(str, module.LENGTHS))} numbers, got {shape}"
                )
            for variant in arguments.variants or module.DEFAULT_VARIANTS:
                if _has(module, variant):
                    dtype = DTYPES[arguments.dtype]
                    found.append(Planned(module, shape, variant, dtype, device))
    return found


def _has(module: ModuleType, variant: str) -> bool:
    return not _refusal(module, variant)


def _refusal(module: ModuleType, variant: str) -> str:
    try:
        module.parse(variant)
    except ValueError as error:
        return str(error)
    return ""


def run(
    planned: Planned, machine: dict[str, Any], settings: Settings, record: Record
) -> tuple[list[dict], list[dict]]:
    """Measure, record and print one case: its rows and goals. A case that cannot be built, or
    breaks as a whole, is one failed row."""
    from bench import goals

    begin = time.perf_counter()
    verdicts: list[dict] = []
    try:
        case = planned.build()
        rows = measure(case, machine, settings)
        if planned.variant in planned.module.DEFAULT_VARIANTS:
            found = getattr(goals, "BLOCK_GOALS", {}).get(case.suite, ())
            verdicts = [
                goals.result(goal, case, rows, settings.mode)
                for goal in found
                if goal.kind in settings.kinds
            ]
    except Exception as error:
        rows = [broken(planned, settings, error)]
    record.write(*rows, *verdicts)
    print(f"\n{table(rows)}\n  ({time.perf_counter() - begin:.1f} s)", flush=True)
    return rows, verdicts


def broken(planned: Planned, settings: Settings, error: Exception) -> dict[str, Any]:
    """The row of a case without numbers. A missing optional package is no failure."""
    absent = isinstance(error, ModuleNotFoundError)
    return {
        "kind": "row",
        "suite": planned.module.__name__.rpartition(".")[2],
        "case": f"{'x'.join(map(str, planned.shape))}, {planned.variant}",
        "dtype": str(planned.dtype).removeprefix("torch."),
        "pass": ",".join(settings.kinds),
        "mode": settings.mode,
        "provider": "(all)",
        "skipped" if absent else "failed": f"{type(error).__name__}: {str(error)[:600]}",
    }


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    unknown = set(arguments.passes) - set(ALL_KINDS)
    if unknown:
        raise SystemExit(f"--passes: {', '.join(unknown)}; expected {' or '.join(ALL_KINDS)}")
    device, mode = device_and_mode(arguments.device, arguments.mode)
    planned = plan(arguments, device)
    settings = Settings(
        mode=mode,
        rounds=arguments.rounds,
        warmup_seconds=arguments.warmup_ms * 1e-3,
        providers=arguments.providers,
        extra=("compile-max",) if arguments.max_autotune else (),
        compile=not arguments.no_compile,
        kinds=arguments.passes,
        count_launches=not arguments.no_launches,
    )
    machine, record = start(device, arguments.out, arguments.commit)
    begin, failed, verdicts = time.perf_counter(), False, []
    for position, each in enumerate(planned):
        spent = time.perf_counter() - begin
        if arguments.budget_s is not None and spent > arguments.budget_s:
            left = len(planned) - position
            print(f"\n{left} cases left out: {spent:.0f} s of {arguments.budget_s:.0f} s are spent")
            record.write({"kind": "note", "left_out": left, "spent_s": spent})
            break
        rows, found = run(each, machine, settings, record)
        verdicts += found
        failed |= any("failed" in row for row in rows)
        release()
    if "goals" in arguments.suites:
        from bench import goals

        failed |= goals.run(machine, settings, record, device)
    if verdicts:
        from bench.goals import goal_table

        print(f"\n{goal_table(verdicts)}")
    print(f"\nrecord: {record.path}")
    return int(failed)


def device_and_mode(device: str | None, mode: str | None) -> tuple[torch.device, str]:
    """What was asked for, else a GPU and graphs where there is one; SystemExit if it cannot be."""
    found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if found.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; --device cpu measures the CPU backends")
    if found.type == "cpu" and mode == timing.GRAPH:
        raise SystemExit("graph-cold needs a GPU; use --mode eager-call on the CPU")
    return found, mode or (timing.GRAPH if found.type == "cuda" else timing.EAGER)


def start(device: torch.device, folder: Path, commit: str | None) -> tuple[dict[str, Any], Record]:
    """The run's first record, written and printed."""
    machine = machines.describe(device, commit)
    record = Record(folder, machine)
    record.write(machine)
    ceilings = machine["ceilings"]
    print(
        f"{machine['gpu'] or 'CPU'}, torch {machine['torch']}, triton {machine['triton']}, "
        f"{machine['commit']}{' (dirty)' if machine['dirty'] else ''}: copy "
        f"{ceilings['bytes_per_s'] * 1e-12:.2f} TB/s, bf16 product "
        f"{ceilings['flops_per_s'] * 1e-12:.0f} TFLOP/s",
        flush=True,
    )
    return machine, record


if __name__ == "__main__":
    raise SystemExit(main())
