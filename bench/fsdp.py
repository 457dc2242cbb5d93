"""PILL's instruct step under FSDP2: `python -m bench.fsdp [options]`.

Processes start on one machine: NCCL where each has a GPU, else gloo on the CPU. Every decoder layer
is sharded. The losses of a few steps must be those of one process with the whole batch; the rest is
speed: tokens/s of all processes against one process with one process's batch (weak scaling).

    python -m bench.fsdp --processes 2 --geometry tiny --batch 2 --length 48 --device cpu
    python -m bench.fsdp --processes 2                              # LLaMA-7B on two GPUs
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn

from bench import llama, methods, timing
from bench.methods import Batch, Method
from bench.run import DTYPES, RESULTS, start
from bench.step import Running

UNITS = 16
"""Rounding units by which losses may differ: sums in another order, through several steps."""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench.fsdp",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--processes", type=int, default=2)
    p.add_argument("--geometry", choices=llama.GEOMETRIES, default="llama-7b")
    p.add_argument("--method", choices=methods.METHODS, default="pill")
    p.add_argument("--batch", type=int, default=4, help="of one process")
    p.add_argument("--length", type=int, default=512)
    p.add_argument("--rank", type=int, default=32)
    p.add_argument("--dtype", choices=DTYPES, default="bf16")
    p.add_argument("--steps", type=int, default=3, help="whose losses are compared")
    p.add_argument("--rounds", type=int, default=5, help="timed steps")
    p.add_argument("--checkpointing", action="store_true")
    p.add_argument("--out", type=Path, default=RESULTS)
    p.add_argument("--commit", help="where there is no git")
    p.add_argument("--device", choices=("cuda", "cpu"))
    return p


class Root(nn.Module):
    """Model and projection as one module whose forward is the loss: what FSDP2 shards."""

    def __init__(self, method: Method):
        super().__init__()
        self.model, self.projection = method.model, method.projection
        self._method = [method]  # not a submodule

    def forward(self, batch: Batch) -> Tensor:
        return self._method[0].loss(batch)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    gpus = torch.cuda.device_count()
    kind = arguments.device or ("cuda" if gpus >= arguments.processes else "cpu")
    if kind == "cuda" and gpus < arguments.processes:
        raise SystemExit(f"{arguments.processes} processes need as many GPUs, there are {gpus}")
    _, record = start(torch.device(kind), arguments.out, arguments.commit)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for processes in (1, arguments.processes):
            multiprocessing.start_processes(
                worker, (processes, kind, folder, arguments), processes, start_method="spawn"
            )
            path = Path(folder) / f"result-{processes}.json"
            results[processes] = json.loads(path.read_text(encoding="utf-8"))
    row = compared(arguments, results, kind)
    record.write(row)
    print(text(row))
    print(f"\nrecord: {record.path}")
    return int("failed" in row)


def worker(
    rank: int, processes: int, kind: str, folder: str, arguments: argparse.Namespace
) -> None:
    """One process: losses over the whole batch, then timed steps on its own part."""
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        init_method=f"file://{folder}/rendezvous-{processes}",
        rank=rank,
        world_size=processes,
    )
    try:
        result = run(rank, processes, arguments, device)
    finally:
        dist.destroy_process_group()
    if rank == 0:
        path = Path(folder) / f"result-{processes}.json"
        path.write_text(json.dumps(result), encoding="utf-8")


def run(
    rank: int, processes: int, arguments: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    geometry, dtype = llama.GEOMETRIES[arguments.geometry], DTYPES[arguments.dtype]
    total = arguments.processes * arguments.batch
    whole = Batch.draw(total, arguments.length, geometry.vocabulary, dtype, device)
    mine = whole.rows(rank * arguments.batch, (rank + 1) * arguments.batch)
    running = sharded(processes, arguments, geometry, dtype, device)
    losses = []
    for _ in range(arguments.steps):
        losses.append(_step(running, whole if processes == 1 else mine, processes))
    running.batch = mine
    running.step()  # another shape than before, for one process
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = [running.timed() for _ in range(arguments.rounds)]
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return {"losses": losses, "seconds": timing.spread(seconds), "peak_bytes": peak}


def sharded(
    processes: int,
    arguments: argparse.Namespace,
    geometry: llama.Geometry,
    dtype: torch.dtype,
    device: torch.device,
) -> Running:
    """The method, its decoder layers sharded if there are several processes, and its optimizer."""
    torch.manual_seed(0)  # the same weights in every process
    base = llama.build(geometry, dtype, device, head=True)
    method = methods.build(arguments.method, base, geometry, arguments.rank, dtype)
    method.checkpointing(arguments.checkpointing)
    root = Root(method)
    if processes > 1:
        from torch.distributed.fsdp import fully_shard

        inner = method.model
        inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
        for layer in inner.model.layers:
            fully_shard(layer)
        fully_shard(root)
    trained = [p for p in root.parameters() if p.requires_grad]
    return Running(_Sharded(root, trained), torch.optim.AdamW(trained, lr=1e-3), None)


class _Sharded:
    """What `bench.step.Running` needs of a method."""

    def __init__(self, root: Root, trained: list[nn.Parameter]):
        self.root, self.parameters = root, dict(enumerate(trained))

    def loss(self, batch: Batch) -> Tensor:
        return self.root(batch)


def _step(running: Running, batch: Batch, processes: int) -> float:
    """A step on `batch`; the mean loss of all processes."""
    running.optimizer.zero_grad(set_to_none=True)
    loss = running.method.loss(batch)
    loss.backward()
    running.optimizer.step()
    running.gradient_norm = 0.0  # not asked for
    mean = loss.detach().double() / processes
    dist.all_reduce(mean)
    return float(mean)


def compared(
    arguments: argparse.Namespace, results: dict[int, dict[str, Any]], kind: str
) -> dict[str, Any]:
    one, many = results[1], results[arguments.processes]
    tokens = arguments.batch * arguments.length
    apart = max(abs(a - b) / abs(b) for a, b in zip(many["losses"], one["losses"], strict=True))
    row = {
        "kind": "fsdp",
        "method": arguments.method,
        "geometry": arguments.geometry,
        "processes": arguments.processes,
        "device": kind,
        "batch": arguments.batch,
        "length": arguments.length,
        "dtype": arguments.dtype,
        "checkpointing": arguments.checkpointing,
        "losses": {"one": one["losses"], "many": many["losses"]},
        "losses_apart": apart,
        "seconds": {"one": one["seconds"], "many": many["seconds"]},
        "peak_bytes": {"one": one["peak_bytes"], "many": many["peak_bytes"]},
        "tokens_per_s": {
            "one": tokens / one["seconds"]["p50"],
            "many": arguments.processes * tokens / many["seconds"]["p50"],
        },
        "efficiency": one["seconds"]["p50"] / many["seconds"]["p50"],
    }
    if not apart <= UNITS * torch.finfo(DTYPES[arguments.dtype]).eps:
        row["failed"] = f"losses differ by {apart:.2e} of themselves"
    return row


def text(row: dict[str, Any]) -> str:
    rates = row["tokens_per_s"]
    lines = [
        f"{row['method']}, {row['geometry']}, {row['batch']} x {row['length']} a process",
        f"  losses, one process   {' '.join(f'{v:.6f}' for v in row['losses']['one'])}",
        f"  losses, {row['processes']} processes   "
        f"{' '.join(f'{v:.6f}' for v in row['losses']['many'])}  apart {row['losses_apart']:.1e}",
        f"  tokens/s {rates['one']:.0f} and {rates['many']:.0f}, weak scaling "
        f"{100 * row['efficiency']:.0f} %",
    ]
    peaks = row["peak_bytes"]
    if peaks["one"] is not None:
        lines.append(f"  peak GB {peaks['one'] / 1e9:.2f} and {peaks['many'] / 1e9:.2f}")
    if "failed" in row:
        lines.append(f"  FAILED {row['failed']}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
