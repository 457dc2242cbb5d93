"""A training step of a whole language model: `python -m bench.step [options]`.

PILL's instruct step against LoRA at equal trained parameters and against the frozen model's own
forward and backward, on random weights of a LLaMA geometry (`bench.methods`): forward, loss,
backward and fused AdamW, with and without activation checkpointing. Tokens/s by the host's clock,
peak memory of a step with everything that the method alone would hold. Methods take turns step by
step; `pill again` is the same model a second time.

    python -m bench.step                                            # LLaMA-7B, 8 x 512 tokens
    python -m bench.step --geometry tiny --batch 2 --length 48      # anywhere
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import llama, methods, timing
from bench.methods import Batch, Method
from bench.run import DTYPES, RESULTS, device_and_mode, names, start

TWINS = {("pill", "pill-eager"), ("lora", "lora-manual")}
"""Pairs that compute the same from the same weights."""
UNITS = {"loss": 4, "gradient norm": 8}
"""By how many rounding units such a pair may differ in its first step."""


@dataclasses.dataclass
class Running:
    """A method with its optimizer, and what was read off while it ran."""

    method: Method
    optimizer: torch.optim.Optimizer
    batch: Batch
    first_loss: float = math.nan
    gradient_norm: float | None = None
    peak: int | None = None

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.method.loss(self.batch)
        loss.backward()
        if self.gradient_norm is None:
            grads = [p.grad for p in self.method.parameters.values() if p.grad is not None]
            squares = [torch.linalg.vector_norm(g, dtype=torch.float32) ** 2 for g in grads]
            self.gradient_norm = float(torch.stack(squares).sum().sqrt())
            self.first_loss = float(loss.detach())
        self.optimizer.step()

    def timed(self) -> float:
        timing.synchronize()
        begin = time.perf_counter()
        self.step()
        timing.synchronize()
        return time.perf_counter() - begin


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench.step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--geometry", choices=llama.GEOMETRIES, default="llama-7b")
    p.add_argument("--layers", type=int, help="instead of the geometry's")
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--length", type=int, default=512, help="of which 32 are image tokens")
    p.add_argument("--rank", type=int, default=32)
    p.add_argument("--methods", type=names, default=list(methods.METHODS))
    p.add_argument("--checkpointing", choices=("off", "on", "both"), default="both")
    p.add_argument("--dtype", choices=DTYPES, default="bf16", help="of weights and activations")
    p.add_argument("--adapter-dtype", choices=DTYPES, default="bf16")
    p.add_argument("--rounds", type=int, default=8)
    p.add_argument("--warmup", type=int, default=2, help="steps of each method")
    p.add_argument("--out", type=Path, default=RESULTS)
    p.add_argument("--commit", help="where there is no git")
    p.add_argument("--device", help="default: cuda where there is one")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if unknown := set(arguments.methods) - methods.METHODS.keys():
        raise SystemExit(
            f"--methods: {', '.join(sorted(unknown))}; there are {', '.join(methods.METHODS)}"
        )
    device, _ = device_and_mode(arguments.device, None)
    geometry = llama.GEOMETRIES[arguments.geometry]
    if arguments.layers:
        geometry = dataclasses.replace(geometry, layers=arguments.layers)
    _, record = start(device, arguments.out, arguments.commit)
    torch.manual_seed(0)
    base = llama.build(geometry, DTYPES[arguments.dtype], device, head=True)
    dtype = DTYPES[arguments.dtype]
    batch = Batch.draw(arguments.batch, arguments.length, geometry.vocabulary, dtype, device)
    failed = False
    for checkpointing in {"off": (False,), "on": (True,), "both": (False, True)}[
        arguments.checkpointing
    ]:
        rows = measure(arguments, base, geometry, batch, checkpointing)
        record.write(*rows)
        print(f"\n{table(rows)}", flush=True)
        failed |= any("failed" in row for row in rows)
    print(f"\nrecord: {record.path}")
    return int(failed)


def measure(
    arguments: argparse.Namespace,
    base: torch.nn.Module,
    geometry: llama.Geometry,
    batch: Batch,
    checkpointing: bool,
) -> list[dict[str, Any]]:
    """Rows of every method, built anew, since training has changed the last ones."""
    running: dict[str, Running] = {}
    rows = {name: _row(name, arguments, geometry, checkpointing) for name in arguments.methods}
    for name, row in rows.items():
        _guarded(row, "build", lambda n=name: _start(running, n, arguments, base, geometry, batch))
        if "failed" not in row:
            running[name].method.checkpointing(checkpointing)
            _guarded(row, "warm-up", lambda n=name: _warm(running[n], arguments.warmup))
        if "failed" in row:
            running.pop(name, None)
            _free()
    _compare_twins(running, rows)
    again = "pill" if "pill" in running else next(iter(running), None)
    turns = [*running, *([f"{again} again"] if again else [])]
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for i in range(arguments.rounds):
        for turn in turns[i % len(turns) :] + turns[: i % len(turns)]:
            name = turn.removesuffix(" again")
            row = rows[name]
            if "failed" not in row:
                _guarded(row, "step", lambda n=name, t=turn: seconds[t].append(running[n].timed()))
    if again and "failed" not in rows[again]:
        rows[f"{again} again"] = _row(f"{again} again", arguments, geometry, checkpointing)
    complete = {n: s for n, s in seconds.items() if len(s) == arguments.rounds}
    spread = None
    if again in complete:
        spread = timing.what_counts(complete[f"{again} again"], complete[again])
    for name, row in rows.items():
        if name in complete:
            found = running[name.removesuffix(" again")]
            row |= _numbers(name, found, complete, batch.tokens)
            row["aa_spread"] = spread
    return list(rows.values())


def _row(
    name: str, arguments: argparse.Namespace, geometry: llama.Geometry, checkpointing: bool
) -> dict[str, Any]:
    return {
        "kind": "step",
        "method": name,
        "geometry": arguments.geometry,
        "layers": geometry.layers,
        "dim": geometry.dim,
        "batch": arguments.batch,
        "length": arguments.length,
        "rank": arguments.rank,
        "dtype": arguments.dtype,
        "adapter_dtype": arguments.adapter_dtype,
        "checkpointing": checkpointing,
    }


def _guarded(row: dict[str, Any], stage: str, action) -> None:
    try:
        action()
    except Exception as error:  # one method must not cost the others their numbers
        absent = isinstance(error, ModuleNotFoundError)
        row["skipped" if absent else "failed"] = f"{stage}: {type(error).__name__}: {error}"[:600]


def _start(running, name, arguments, base, geometry, batch) -> None:
    dtype = DTYPES[arguments.adapter_dtype]
    method = methods.build(name, base, geometry, arguments.rank, dtype)
    optimizer = torch.optim.AdamW(
        method.parameters.values(), lr=1e-4, fused=batch.ids.device.type == "cuda"
    )
    running[name] = Running(method, optimizer, batch)


def _warm(running: Running, steps: int) -> None:
    for _ in range(max(1, steps)):
        running.step()
    timing.synchronize()
    if not math.isfinite(running.first_loss):
        raise ArithmeticError(f"the loss is {running.first_loss}")
    running.peak = _peak(running)


def _peak(running: Running) -> int | None:
    """Memory of a step above what is held between steps."""
    if not torch.cuda.is_available() or running.batch.ids.device.type != "cuda":
        return None
    running.optimizer.zero_grad(set_to_none=True)
    timing.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    running.step()
    timing.synchronize()
    running.optimizer.zero_grad(set_to_none=True)
    return torch.cuda.max_memory_allocated() - before


def _held(running: Running) -> int:
    """Bytes of all weights and of the optimizer's state, gradients aside."""
    weights = {p.data_ptr(): p.nbytes for p in running.method.model.parameters()}
    weights |= {p.data_ptr(): p.nbytes for p in running.method.parameters.values()}
    states = [
        t.nbytes
        for state in running.optimizer.state.values()
        for t in state.values()
        if isinstance(t, torch.Tensor)
    ]
    return sum(weights.values()) + sum(states)


def _compare_twins(running: dict[str, Running], rows: dict[str, dict[str, Any]]) -> None:
    """No time for a method whose first loss and gradients are not those of its twin."""
    for ours, theirs in TWINS:
        if ours not in running or theirs not in running:
            continue
        unit = torch.finfo(DTYPES[rows[ours]["dtype"]]).eps
        for what, name in (("loss", "first_loss"), ("gradient norm", "gradient_norm")):
            a, b = (getattr(running[method], name) for method in (ours, theirs))
            if not abs(a - b) <= UNITS[what] * unit * abs(b):
                rows[ours].setdefault(
                    "failed", f"gate: {what} {a:.6g}, that of {theirs} is {b:.6g}"
                )


def _numbers(
    name: str, running: Running, seconds: dict[str, list[float]], tokens: int
) -> dict[str, Any]:
    spread = timing.spread(seconds[name])
    held = _held(running)
    return {
        "seconds": spread,
        "tokens_per_s": tokens / spread["p50"],
        "trained": running.method.trained,
        "loss": running.first_loss,
        "gradient_norm": running.gradient_norm,
        "held_bytes": held,
        "step_bytes": running.peak,
        "peak_bytes": None if running.peak is None else running.peak + held,
        "ratio": {
            other: timing.ratios(seconds[name], column)
            for other, column in seconds.items()
            if other != name
        },
    }


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def table(rows: list[dict[str, Any]]) -> str:
    head = ("method", "s/step", "tokens/s", "x frozen", "peak GB", "trained", "loss")
    first = rows[0]
    lines = [head]
    for row in rows:
        if "seconds" not in row:
            why = row.get("failed") or row.get("skipped") or "no time"
            lines.append((row["method"], f"{'FAILED' if 'failed' in row else 'skipped'} {why}"))
            continue
        against = row["ratio"].get("frozen")
        peak = row["peak_bytes"]
        lines.append(
            (
                row["method"],
                f"{row['seconds']['p50']:.4f}",
                f"{row['tokens_per_s']:.0f}",
                "-" if against is None else f"{against['p50']:.3f}",
                "-" if peak is None else f"{peak / 1e9:.2f}",
                f"{row['trained']:,}",
                f"{row['loss']:.4f}",
            )
        )
    widths = [max(len(line[i]) for line in lines if len(line) > 2) for i in range(len(head))]
    widths[0] = max(len(line[0]) for line in lines)
    spread = next((r["aa_spread"] for r in rows if r.get("aa_spread") is not None), None)
    title = (
        f"{first['geometry']}, {first['layers']} layers, {first['batch']} x {first['length']} "
        f"tokens, checkpointing {'on' if first['checkpointing'] else 'off'}"
        + ("" if spread is None else f"; differences below {100 * spread:.1f} % say nothing")
    )
    body = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=False)) for line in lines]
    return "\n".join([title, *(f"  {line}".rstrip() for line in body)])


if __name__ == "__main__":
    raise SystemExit(main())
