"""How memory and time grow: `python -m bench.growth [tokens] [layers] [options]`.

`tokens`: forward and backward of the routed adapter behind its norm, 512 to 524,288 tokens; bytes
kept for backward beyond x, peak memory, milliseconds. `layers`: a stack of 1 to 16 such adapters,
what a model with so many adapted layers keeps. Lines are fitted to each provider's figures, and the
largest deviation is reported: whatever is not proportional shows there. Results are checked on the
first rows of each problem against fp64.

    python -m bench.growth                       # both, up to memory
    python -m bench.growth tokens --dim 64 --rank 4 --most 4096
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import probes, timing
from bench.case import BOTH, Case, as_tuple
from bench.cases import EPS, image_of, routed
from bench.fit import line
from bench.gate import GateError, error
from bench.measure import release
from bench.run import DTYPES, RESULTS, device_and_mode, names, start
from mmadapt import nn

VARIANT = "norm-frozen"
LAYERS = (1, 2, 4, 8, 16)
CHECKED_ROWS = 512
PROVIDERS = ("where", "cpu", "triton", "cuda")
LARGEST_IN_GRAPH = 2**30
"""Bytes of x above which calls are timed without a graph, which would hold memory of its own; they
take milliseconds, so that the host's share is small."""
QUANTITIES = {"saved_bytes": "B", "peak_bytes": "B", "ms": "ms"}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench.growth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("over", nargs="*", metavar="tokens|layers", help="default: both")
    p.add_argument("--dim", type=int, default=4096)
    p.add_argument("--rank", type=int, default=32)
    p.add_argument("--least", type=int, default=512)
    p.add_argument("--most", type=int, default=524288)
    p.add_argument("--tokens", type=int, default=8192, help="of the stack of layers")
    p.add_argument("--providers", type=names, default=list(PROVIDERS))
    p.add_argument("--dtype", choices=DTYPES, default="bf16")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--out", type=Path, default=RESULTS)
    p.add_argument("--commit", help="where there is no git")
    p.add_argument("--device", help="default: cuda where there is one")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    over = arguments.over or ["tokens", "layers"]
    if unknown := set(over) - {"tokens", "layers"}:
        raise SystemExit(f"{', '.join(sorted(unknown))}: expected tokens or layers")
    device, mode = device_and_mode(arguments.device, None)
    machine, record = start(device, arguments.out, arguments.commit)
    failed = False
    for what in over:
        rows: list[dict[str, Any]] = []
        sweep = tokens if what == "tokens" else layers
        for found in sweep(arguments, device, mode, machine["l2_bytes"]):
            record.write(found)
            print(text(found), flush=True)
            rows.append(found)
        fits = fitted(rows)
        record.write(*fits)
        for fit in fits:
            print(fit_text(fit), flush=True)
        failed |= any("failed" in row for row in rows)
    print(f"\nrecord: {record.path}")
    return int(failed)


def tokens(
    arguments: argparse.Namespace, device: torch.device, mode: str, l2_bytes: int
) -> Iterable[dict[str, Any]]:
    """A row per number of tokens (doubling) and provider; a provider stops where memory ends."""
    ended: set[str] = set()
    count = arguments.least
    while count <= arguments.most:
        shape = (count, arguments.dim, arguments.rank)
        try:
            case = routed.build(shape, VARIANT, DTYPES[arguments.dtype], device)
            case.rotate(BOTH, 3 * l2_bytes)
        except torch.OutOfMemoryError as problem:
            row = _row("tokens", "(inputs)", count, arguments, mode)
            yield row | {"ended": f"out of memory: {problem}"[:200]}
            release()
            return
        for name in arguments.providers:
            provider = case.providers.get(name)
            if provider is None or provider.skip is not None or name in ended:
                continue
            row = _row("tokens", name, count, arguments, mode)
            with _last_unless_measured(name, row, ended):
                check_rows(case, name)
                row |= _of_case(case, name, mode, arguments.rounds)
            yield row
            release()
        del case
        release()
        count *= 2


@contextmanager
def _last_unless_measured(name: str, row: dict[str, Any], ended: set[str]) -> Iterator[None]:
    """Write into the row why there is no measurement, and end the provider's series there."""
    try:
        yield
    except torch.OutOfMemoryError as problem:
        ended.add(name)
        row["ended"] = f"out of memory: {problem}"[:200]
    except Exception as problem:
        ended.add(name)
        row["failed"] = f"{type(problem).__name__}: {problem}"[:600]


def check_rows(case: Case, provider: str) -> None:
    """y and dx of the first rows by the gate's rule: at most twice eager's error plus a unit."""
    rows = slice(0, min(CHECKED_ROWS, case.tokens))
    names = ("y", *(f"d{n}" for n in case.activations))
    (x,) = (t[rows].detach().double().requires_grad_() for t in case.activations.values())
    wide = {n: t.detach().double() for n, t in (case.parameters | case.frozen).items()}
    per_token = {n: t[rows] for n, t in case.per_token.items()}
    dy = case.dys[0][0][rows]
    y = case.exact(x=x, **wide, **per_token)
    exact = [y.detach(), *torch.autograd.grad(y, x, dy.double())]
    small = case.activations["x"][rows].detach().clone().requires_grad_()
    eager_y = as_tuple(
        case.providers[case.eager].function(x=small, **case.parameters, **case.frozen, **per_token)
    )[0]
    eager = [eager_y.detach(), *torch.autograd.grad(eager_y, small, dy)]
    ours = case.make(provider, BOTH)(0)[: len(names)]
    for name, a, b, e in zip(names, ours, eager, exact, strict=True):
        found, theirs = error(a[rows], e).rms, error(b, e).rms
        if not found <= 2 * theirs + torch.finfo(b.dtype).eps:
            raise GateError(f"{name}: error {found:.2e}, eager's is {theirs:.2e}")


def _of_case(case: Case, provider: str, mode: str, rounds: int) -> dict[str, Any]:
    call = case.make(provider, BOTH)
    if case.activations["x"].nbytes > LARGEST_IN_GRAPH:
        mode = timing.EAGER
    make = timing.GraphTimer if mode == timing.GRAPH else timing.EagerTimer
    extra = {} if mode == timing.GRAPH else {"calls": 2}
    timer = make(call, len(case.slots), **extra)
    seconds = timing.interleave({provider: timer}, rounds, 0.0)[provider]
    return {
        "mode": mode,
        **probes.memory(case, provider, BOTH),
        "ms": 1e3 * timing.quantile(seconds, 0.5),
    }


def layers(
    arguments: argparse.Namespace, device: torch.device, mode: str, l2_bytes: int
) -> Iterable[dict[str, Any]]:
    """A row per number of adapters in a row, for mmadapt's modules and for the eager formula."""
    dtype, count = DTYPES[arguments.dtype], arguments.tokens
    draw = torch.Generator(device).manual_seed(0)
    x = torch.randn(count, arguments.dim, generator=draw, device=device).to(dtype)
    x.requires_grad_()
    ids = image_of(routed.parse(VARIANT), count, device).int()
    ended: set[str] = set()
    for number in LAYERS:
        stack = [_experts(arguments, dtype, device) for _ in range(number)]
        for name, forward in (("eager", _eager), ("mmadapt", _fused)):
            if name in ended:
                continue
            row = _row("layers", name, number, arguments, timing.EAGER) | {"tokens": count}
            with _last_unless_measured(name, row, ended):
                row |= _of_stack(forward, stack, x, ids, arguments.rounds, device)
            yield row
            release()


def _experts(
    arguments: argparse.Namespace, dtype: torch.dtype, device: torch.device
) -> nn.ModalityExperts:
    module = nn.ModalityExperts(
        arguments.dim, arguments.rank, residual="norm", norm_eps=EPS, device=device, dtype=dtype
    )
    torch.nn.init.normal_(module.up, std=0.02)
    module.norm_weight.requires_grad_(False)
    return module


def _eager(module: nn.ModalityExperts, x: Tensor, ids: Tensor) -> Tensor:
    return routed.where("norm")(x, module.gate, module.down, module.up, module.norm_weight, ids)


def _fused(module: nn.ModalityExperts, x: Tensor, ids: Tensor) -> Tensor:
    return module(x, ids)


def _of_stack(
    forward: Callable[..., Tensor],
    stack: list[nn.ModalityExperts],
    x: Tensor,
    ids: Tensor,
    rounds: int,
    device: torch.device,
) -> dict[str, Any]:
    parameters = [p for module in stack for p in module.parameters() if p.requires_grad]
    own = {t.untyped_storage().data_ptr() for t in (x, ids, *parameters)}
    own |= {m.norm_weight.untyped_storage().data_ptr() for m in stack}
    dy = torch.ones_like(x)

    def run() -> Tensor:
        y = x
        for module in stack:
            y = forward(module, y, ids)
        return y

    def both(slot: int = 0) -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(), [x, *parameters], dy)

    if not all(torch.isfinite(g).all() for g in both()):
        raise ArithmeticError("a gradient is not finite")
    seconds = timing.interleave({"": timing.EagerTimer(both, 1, calls=2)}, rounds, 0.0)[""]
    return {
        "saved_bytes": probes.kept_bytes(run, own),
        "peak_bytes": probes.peak_bytes(both, device),
        "ms": 1e3 * timing.quantile(seconds, 0.5),
    }


def _row(
    over: str, provider: str, value: int, arguments: argparse.Namespace, mode: str
) -> dict[str, Any]:
    return {
        "kind": "growth",
        "over": over,
        "value": value,
        "provider": provider,
        "dim": arguments.dim,
        "rank": arguments.rank,
        "dtype": arguments.dtype,
        "variant": VARIANT,
        "mode": mode,
        "pass": BOTH,
    }


def fitted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line per provider and quantity, where there are three points or more."""
    fits = []
    for provider in dict.fromkeys(row["provider"] for row in rows):
        for quantity, unit in QUANTITIES.items():
            points = [
                (row["value"], row[quantity])
                for row in rows
                if row["provider"] == provider and row.get(quantity)
            ]
            if len(points) < 3:
                continue
            found = line(*zip(*points, strict=True))
            fits.append(
                {
                    "kind": "fit",
                    "over": rows[0]["over"],
                    "provider": provider,
                    "quantity": quantity,
                    "unit": unit,
                    "intercept": found.intercept,
                    "slope": found.slope,
                    "max_deviation": found.deviation,
                    "points": len(points),
                    "range": [points[0][0], points[-1][0]],
                }
            )
    return fits


def text(row: dict[str, Any]) -> str:
    head = f"{row['over']} {row['value']:>7} {row['provider']:<8}"
    if "ms" not in row:
        return f"{head} {row.get('ended') or 'FAILED ' + row['failed']}"
    peak = row["peak_bytes"]
    return (
        f"{head} saved {row['saved_bytes'] / 1e6:10.3f} MB, peak "
        f"{'-' if peak is None else f'{peak / 1e6:.1f} MB'}, {row['ms']:.3f} ms"
    )


def fit_text(fit: dict[str, Any]) -> str:
    one = {"tokens": "token", "layers": "layer"}[fit["over"]]
    return (
        f"  {fit['provider']}: {fit['quantity']} = {fit['intercept']:.4g} + {fit['slope']:.4g} "
        f"{fit['unit']} a {one}; off by at most {100 * fit['max_deviation']:.1f} %"
    )


if __name__ == "__main__":
    raise SystemExit(main())
