"""Records as the suites write them, with chosen numbers."""

import json

from bench.case import BOTH, FORWARD

SPREAD = {"p20": 0.9, "p50": 1.0, "p80": 1.1}


def spread(middle):
    return {p: middle * f for p, f in SPREAD.items()}


def run(time="2026-12-01T00:00:00+00:00", gpu="NVIDIA H200", commit="abc1234"):
    return {
        "kind": "run",
        "time": time,
        "gpu": gpu,
        "name": "h200" if gpu else "cpu",
        "torch": "2.11.0",
        "triton": "3.6.0",
        "commit": commit,
        "dirty": False,
        "l2_bytes": 0,
        "ceilings": {"bytes_per_s": 4e12, "flops_per_s": 7e14},
    }


def case(times, *, suite="adapter", tokens=512, dim=64, rank=8, kind=FORWARD, **more):
    """One row per provider; `times` in milliseconds, None for a failure."""
    shape = {"tokens": tokens, "dim": dim, "rank": rank, "variant": "plain"} | more
    rows = []
    for name, ms in times.items():
        row = {
            "kind": "row",
            "suite": suite,
            "case": f"{tokens} x {dim}, m={rank}, plain",
            "shape": shape,
            "dtype": "bfloat16",
            "pass": kind,
            "mode": "graph-cold",
            "provider": name,
        }
        if ms is None:
            rows.append(row | {"failed": "gate: GateError: y: too large"})
            continue
        timed = {n: other for n, other in times.items() if other is not None and n != name}
        rows.append(
            row
            | {
                "ms": spread(ms),
                "gb_per_s": 1000.0 / ms,
                "tflops": 10.0 / ms,
                "limit_ms": 0.01,
                "percent_of_limit": 1.0 / ms,
                "ratio": {n: spread(ms / other) for n, other in timed.items()},
                "aa_spread": 0.02,
                "peak_bytes": 10**9,
                "saved_bytes": 10**6 if kind == BOTH else None,
            }
        )
    return rows


def goal(value, *, goal="forward, over a copy of x", bound=1.65, at_least=False):
    met = None
    if value is not None:
        met = value >= bound if at_least else value <= bound
    return {
        "kind": "goal",
        "suite": "adapter",
        "case": "512 x 64",
        "goal": goal,
        "mode": "graph-cold",
        "measured": value,
        "bound": bound,
        "at_least": at_least,
        "unit": "x",
        "met": met,
        "aa_spread": 0.01,
        "why": None if value is not None else "not available",
    }


def step(method, seconds, others, checkpointing=False):
    return {
        "kind": "step",
        "method": method,
        "geometry": "llama-7b",
        "layers": 32,
        "batch": 8,
        "length": 512,
        "rank": 32,
        "adapter_dtype": "bf16",
        "checkpointing": checkpointing,
        "seconds": spread(seconds),
        "tokens_per_s": 4096 / seconds,
        "trained": 45_088_768,
        "loss": 10.4,
        "peak_bytes": 50 * 10**9,
        "ratio": {n: spread(seconds / s) for n, s in others.items() if n != method},
        "aa_spread": 0.01,
    }


def growth(provider, value, saved, over="tokens"):
    return {
        "kind": "growth",
        "over": over,
        "value": value,
        "provider": provider,
        "dim": 4096,
        "rank": 32,
        "dtype": "bf16",
        "saved_bytes": saved,
        "peak_bytes": 3 * saved,
        "ms": saved / 1e6,
    }


def everything():
    """A run of every kind of row."""
    steps = {"frozen": 0.2, "lora": 0.3, "pill": 0.25}
    sweep = {512: (0.03, 0.06), 2048: (0.05, 0.12), 8192: (0.1, 0.4)}
    ms = {"frozen": 1.0, "mmadapt": 0.9, "pill-eager": 1.3}
    fit = {"kind": "fit", "over": "tokens", "provider": "triton", "quantity": "saved_bytes"}
    return [
        run(),
        *(
            row
            for kind in (FORWARD, BOTH)
            for tokens, (ours, theirs) in sweep.items()
            for row in case(
                {"copy": 0.01, "eager": theirs, "triton": ours, "triton again": ours},
                tokens=tokens,
                kind=kind,
            )
        ),
        *(
            row
            for dim in (32, 128)
            for rank in (8, 16)
            for row in case({"eager": 0.1, "triton": 0.1 * rank / 12}, dim=dim, rank=rank)
        ),
        *(
            row
            for kind in (FORWARD, BOTH)
            for row in case(ms | {"mmadapt-compile": None}, suite="block", kind=kind, batch=16)
        ),
        *(step(n, s, steps, on) for on in (False, True) for n, s in steps.items()),
        *(
            growth(n, t, f * t)
            for t in (512, 1024, 2048)
            for n, f in (("where", 50), ("triton", 4))
        ),
        fit
        | {"unit": "B", "intercept": 0.0, "slope": 132.0, "max_deviation": 0.001}
        | {"points": 3, "range": [512, 2048]},
        {
            "kind": "overhead",
            "contract": "adapter",
            "tokens": 1,
            "pass": FORWARD,
            "dtype": "bfloat16",
            "level": "op",
            "us": spread(80.0),
        },
        goal(1.5),
        goal(2.0, goal="forward+backward, over others", bound=4.0, at_least=True),
    ]


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path
