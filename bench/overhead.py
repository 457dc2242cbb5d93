"""What a call costs the host: `python -m bench.overhead [options]`.

Few tokens, so that the device has nothing to do: microseconds until a call returns, without waiting
for the device, for the formula in plain torch (`eager`), mmadapt's operator (`op`), its module
(`module`) and the compiled module (`compiled`), forward under `no_grad` and forward with backward.
All levels of a contract take turns, after their results have agreed with eager's.
`bench/test_overhead.py` holds the CPU's ratios to eager against the committed baseline.

    python -m bench.overhead --contracts adapter,routed
    python -m bench.overhead --device cpu --write-baseline
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench import timing
from bench.case import FORWARD, KINDS, as_tuple
from bench.cases import EPS, adapter, is_image, routed
from bench.run import DTYPES, RESULTS, device_and_mode, names, start
from mmadapt import nn, ops

TOKENS = (1, 64)
DIM, RANK, HEADS = 256, 16, 4
BASELINE = Path(__file__).resolve().parent / "baselines" / "overhead-cpu.json"
LEVELS = ("eager", "op", "module", "compiled")

Levels = dict[str, Callable[[], Tensor]]


class HostTimer:
    """A loop of calls until the last one has returned; the device is waited for before and after,
    outside the measured time."""

    def __init__(self, call: Callable[[], object], calls: int):
        self.call, self.calls = call, calls
        for _ in range(3):
            call()

    def start(self) -> Callable[[], float]:
        timing.synchronize()
        begin = time.perf_counter()
        for _ in range(self.calls):
            self.call()
        seconds = (time.perf_counter() - begin) / self.calls
        timing.synchronize()
        return lambda: seconds


def _adapter(x: Tensor) -> tuple[Levels, list[Tensor]]:
    module = _random(nn.SwiGLUAdapter(DIM, RANK), x)
    weights = [module.gate, module.down, module.up]
    return {
        "eager": lambda: adapter.eager(x, *weights),
        "op": lambda: ops.swiglu_adapter(x, *weights),
        "module": lambda: module(x),
    }, [x, *weights]


def _routed(x: Tensor) -> tuple[Levels, list[Tensor]]:
    module = _random(nn.ModalityExperts(DIM, RANK, norm_eps=EPS, residual="norm"), x)
    weights = [module.gate, module.down, module.up, module.norm_weight]
    ids = is_image(x.shape[0], x.device).int()
    norm, eager = (module.norm_weight, EPS), routed.where("norm")
    return {
        "eager": lambda: eager(x, *weights, ids),
        "op": lambda: ops.swiglu_adapter(x, *weights[:3], expert=ids, norm=norm, residual="norm"),
        "module": lambda: module(x, ids),
    }, [x, *weights]


def _cp_linear(x: Tensor) -> tuple[Levels, list[Tensor]]:
    base = torch.nn.Linear(DIM, DIM, device=x.device, dtype=x.dtype)
    factors = nn.CPFactors(DIM, DIM, RANK)
    module = _random(nn.CPLinear(base, factors), x)
    a, b, mode = factors.factor_in, factors.factor_out, module.mode

    def eager() -> Tensor:
        return linear(x, base.weight, base.bias) + linear(linear(x, a) * (factors.core * mode), b)

    return {
        "eager": eager,
        "op": lambda: ops.cp_linear(x, base.weight, base.bias, a, b, factors.core * mode),
        "module": lambda: module(x),
    }, [x, a, b, factors.core, mode]


def _gate(x: Tensor) -> tuple[Levels, list[Tensor]]:
    module = _random(nn.ModalityGate(DIM, HEADS), x)
    values, mask = x.detach().clone().requires_grad_(), is_image(x.shape[0], x.device)

    def eager() -> Tensor:
        heads = values.unflatten(-1, (HEADS, -1))
        gated = heads * torch.tanh(linear(x, module.gate)).unsqueeze(-1)
        return torch.where(mask[:, None, None], gated, heads).flatten(-2)

    return {
        "eager": eager,
        "op": lambda: ops.projected_modality_gate(values, x, module.gate, mask),
        "module": lambda: module(values, mask, x),
    }, [x, values, module.gate]


def _random(module: torch.nn.Module, x: Tensor) -> torch.nn.Module:
    module.to(x.device, x.dtype)
    generator = torch.Generator(x.device).manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return module


CONTRACTS = {"adapter": _adapter, "routed": _routed, "cp_linear": _cp_linear, "gate": _gate}


def calls(
    contract: str, tokens: int, kind: str, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], object]]:
    """A callable a level."""
    torch.manual_seed(0)
    x = torch.randn(tokens, DIM, device=device).to(dtype).requires_grad_()
    levels, wanted = CONTRACTS[contract](x)
    # A function of no arguments for Dynamo to trace: the tensors are its closure.
    levels["compiled"] = torch.compile(levels["module"], dynamic=False)
    dy = torch.ones(tokens, DIM, device=device, dtype=dtype)

    def made(level: Callable[[], Tensor]) -> Callable[[], object]:
        if kind == FORWARD:
            return torch.no_grad()(level)
        return lambda: torch.autograd.grad(level(), wanted, dy)

    return {name: made(level) for name, level in levels.items()}


def measure(
    contract: str,
    tokens: int,
    kind: str,
    dtype: torch.dtype,
    device: torch.device,
    levels: Sequence[str] = LEVELS,
    rounds: int = 15,
    times: int = 20,
) -> list[dict[str, Any]]:
    """A row per level: microseconds of the host, ratio to eager."""
    rows: dict[str, dict[str, Any]] = {}
    timers: dict[str, timing.Timer] = {}
    made = calls(contract, tokens, kind, dtype, device)
    for level, call in made.items():
        if level not in levels:
            continue
        rows[level] = {
            "kind": "overhead",
            "contract": contract,
            "tokens": tokens,
            "pass": kind,
            "dtype": str(dtype).removeprefix("torch."),
            "level": level,
        }
        try:
            check(call(), made["eager"]())
            timers[level] = HostTimer(call, times)
        except Exception as error:
            rows[level]["failed"] = f"{type(error).__name__}: {str(error)[:600]}"
    seconds = timing.interleave(timers, rounds, 0.05) if timers else {}
    for level, found in seconds.items():
        rows[level]["us"] = {p: 1e6 * s for p, s in timing.spread(found).items()}
        rows[level]["us"]["best"] = 1e6 * min(found)
        if "eager" in seconds:
            rows[level]["over_eager"] = timing.ratios(found, seconds["eager"])
            # Other work on the machine only ever adds: the best rounds are the ones to compare.
            rows[level]["over_eager"]["best"] = min(found) / min(seconds["eager"])
    return list(rows.values())


def check(found: Any, expected: Any) -> None:
    """Raise unless results agree with eager's to the rounding of a few dozen terms."""
    for a, b in zip(as_tuple(found), as_tuple(expected), strict=True):
        off = float((a.float() - b.float()).norm())
        bound = 8 * torch.finfo(b.dtype).eps * float(b.float().norm())
        if not off <= bound:
            raise ArithmeticError(f"differs from eager by {off:.2e}, allowed {bound:.2e}")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench.overhead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--contracts", type=names, default=list(CONTRACTS))
    p.add_argument("--no-compile", action="store_true")
    p.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 on a CPU")
    p.add_argument("--rounds", type=int, default=15)
    p.add_argument("--write-baseline", action="store_true", help=f"CPU ratios to {BASELINE.name}")
    p.add_argument("--out", type=Path, default=RESULTS)
    p.add_argument("--commit", help="where there is no git")
    p.add_argument("--device", help="default: cuda where there is one")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if unknown := set(arguments.contracts) - CONTRACTS.keys():
        raise SystemExit(f"--contracts: {', '.join(sorted(unknown))}; there are {list(CONTRACTS)}")
    device, _ = device_and_mode(arguments.device, None)
    dtype = DTYPES[arguments.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    levels = LEVELS[:-1] if arguments.no_compile else LEVELS
    _, record = start(device, arguments.out, arguments.commit)
    found = []
    for contract in arguments.contracts:
        for tokens in TOKENS:
            for kind in KINDS:
                rows = measure(contract, tokens, kind, dtype, device, levels, arguments.rounds)
                record.write(*rows)
                print(line(rows), flush=True)
                found += rows
            torch._dynamo.reset()
    if arguments.write_baseline:
        write_baseline(found)
    print(f"\nrecord: {record.path}")
    return int(any("failed" in row for row in found))


def line(rows: list[dict[str, Any]]) -> str:
    first = rows[0]
    cells = []
    for row in rows:
        if "us" in row:
            ratio = row.get("over_eager")
            times = "" if ratio is None else f" ({ratio['p50']:.2f}x)"
            cells.append(f"{row['level']} {row['us']['p50']:.1f}{times}")
        else:
            cells.append(f"{row['level']} FAILED {row['failed'][:120]}")
    title = f"{first['contract']}, T={first['tokens']}, {first['pass']}: us a call: "
    return title + ", ".join(cells)


def key(row: dict[str, Any]) -> str:
    return f"{row['contract']} T={row['tokens']} {row['pass']} {row['level']}"


def write_baseline(rows: list[dict[str, Any]]) -> None:
    """Ratios to eager of the best rounds, and their microseconds, for reading."""
    table = {
        key(row): {"us": round(row["us"]["best"], 1), "over_eager": round(r["best"], 3)}
        for row in rows
        if (r := row.get("over_eager")) is not None
    }
    BASELINE.parent.mkdir(exist_ok=True)
    about = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    BASELINE.write_text(json.dumps({"about": about, "rows": table}, indent=1) + "\n")


def baseline() -> dict[str, dict[str, float]]:
    return json.loads(BASELINE.read_text(encoding="utf-8"))["rows"]


if __name__ == "__main__":
    raise SystemExit(main())
