"""From how many tokens the Triton backend pays: `python -m bench.crossover --out FILE`.

Times it against the reference backend as a user calls them, on the host's clock (`eager-call`),
over numbers of tokens; writes for each contract and dtype the least number from which it is never
slower, forward alone or with backward, and every time. `mmadapt/ops/_backends/crossovers.json` is
such a file: what the automatic choice of a backend reads.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from bench import machine, timing
from bench.case import KINDS
from bench.cases import adapter, cp_linear, gate, routed
from bench.measure import release

TOKENS = (1, 16, 64, 256, 1024, 4096)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
PROBLEMS = {
    "swiglu_adapter": [(adapter, (4096, 32), "plain"), (routed, (4096, 32), "norm")],
    "cp_linear": [(cp_linear, (768, 64), "single"), (cp_linear, (4096, 64), "single")],
    "modality_gate": [(gate, (32, 128), "static")],
    "projected_modality_gate": [(gate, (32, 128), "projected")],
}


def measure(op: str, dtype: torch.dtype, device: torch.device) -> list[dict]:
    """Microseconds a call of both backends, by problem, tokens and pass."""
    rows = []
    for suite, size, variant in PROBLEMS[op]:
        for tokens in TOKENS:
            case = suite.build((tokens, *size), variant, dtype, device)
            for kind in KINDS:
                timers = {
                    name: timing.EagerTimer(case.make(name, kind), 1, calls=10)
                    for name in ("triton", "reference")
                }
                seconds = timing.interleave(timers, 7, 0.02)
                rows.append(
                    {"problem": case.label, "tokens": tokens, "pass": kind}
                    | {n: 1e6 * timing.quantile(s, 0.5) for n, s in seconds.items()}
                )
            release()
    return rows


def least_tokens(rows: list[dict]) -> int | None:
    """The least number of tokens from which Triton is never slower; None: there is none."""
    least = None
    for tokens in sorted({row["tokens"] for row in rows}, reverse=True):
        here = [row for row in rows if row["tokens"] == tokens]
        if any(row["triton"] > row["reference"] for row in here):
            break
        least = tokens
    return least


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.crossover")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit")
    parser.add_argument("--ops", default=",".join(PROBLEMS), help="contracts, with commas between")
    arguments = parser.parse_args()
    ops = arguments.ops.split(",")
    if unknown := set(ops) - set(PROBLEMS):
        parser.error(f"--ops: {', '.join(sorted(unknown))}; expected some of {', '.join(PROBLEMS)}")
    device = torch.device("cuda")
    major, minor = torch.cuda.get_device_capability()
    about = {k: v for k, v in machine.describe(device, arguments.commit).items() if k != "kind"}
    entries = []
    for op in ops:
        for name, dtype in DTYPES.items():
            rows = measure(op, dtype, device)
            least = least_tokens(rows)
            entries.append(
                {"op": op, "backend": "triton", "dtype": name, "min_tokens": least, "rows": rows}
            )
            print(f"{op} {name}: from {least} tokens", flush=True)
            for row in rows:
                print(
                    f"  {row['tokens']:5d} {row['pass']:17s} triton {row['triton']:8.1f} "
                    f"reference {row['reference']:8.1f} us  {row['problem']}"
                )
            # After each entry, so that a run that is cut short keeps what it has measured.
            table = {"architecture": f"sm_{major}{minor}", "machine": about, "entries": entries}
            arguments.out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
