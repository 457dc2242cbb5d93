"""The project's goals as cases: measured value, bound, met or not.

Each is a figure inside one run on one GPU, at the shape the goal was set for: a ratio to a copy of
x, to the byte floor (algorithmic bytes at this GPU's measured copy rate), to another provider, or
microseconds or saved bytes where the goal names them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench.case import BOTH, FORWARD, Case
from bench.cases import adapter, block, cp_linear, gate, routed
from bench.measure import Settings, measure, release
from bench.report import Record, table
from mmadapt.ops import backends

OURS = "triton"
CUDA = "cuda"
Rows = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Goal:
    """`measured` reads the value from a case's rows of one pass, by provider, or None."""

    text: str
    kind: str
    bound: float
    measured: Callable[[Rows, Case], float | None]
    unit: str = "x"
    at_least: bool = False
    provider: str | None = None
    """Whose figure it is; None: OURS."""

    def verdict(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


@dataclass(frozen=True)
class Problem:
    """A case, the providers its goals need, and the goals."""

    suite: Any
    shape: tuple[int, int, int]
    variant: str
    providers: tuple[str, ...]
    goals: tuple[Goal, ...]

    def build(self, device: torch.device) -> Case:
        case = self.suite.build(self.shape, self.variant, torch.bfloat16, device)
        missing = set(self.providers) - case.providers.keys()
        assert not missing, missing
        return case

    def with_cuda(self, *bounds: float, op: str = "swiglu_adapter") -> Problem:
        """The same goals for the CUDA backend of `op`, with its own bounds, where there is one."""
        if CUDA not in backends(op):
            return self
        more = tuple(
            dataclasses.replace(
                goal,
                text=f"CUDA: {goal.text}",
                bound=bound,
                provider=(goal.provider or OURS).replace(OURS, CUDA),
            )
            for goal, bound in zip(self.goals, bounds, strict=True)
        )
        providers = dict.fromkeys((*self.providers, *(goal.provider for goal in more)))
        return dataclasses.replace(self, providers=(*providers,), goals=(*self.goals, *more))


def over(*others: str) -> Callable[[Rows, Case], float | None]:
    """Our time over that of the fastest of `others`; None if one of them has no time."""

    def measured(rows: Rows, case: Case) -> float | None:
        ours = rows.get(OURS, {}).get("ratio", {})
        if any(name not in ours for name in others):
            return None
        return max(ours[name]["p50"] for name in others)

    return measured


def speedup_over(*others: str) -> Callable[[Rows, Case], float | None]:
    """Time of the fastest of `others` over ours."""

    def measured(rows: Rows, case: Case) -> float | None:
        slowdown = over(*others)(rows, case)
        return None if slowdown is None else 1 / slowdown

    return measured


def over_limit(rows: Rows, case: Case) -> float | None:
    """Our time over the byte floor (these cases are far from the arithmetic limit)."""
    ours = rows.get(OURS, {})
    return ours["ms"]["p50"] / ours["limit_ms"] if "ms" in ours else None


def microseconds(rows: Rows, case: Case) -> float | None:
    ours = rows.get(OURS, {})
    return 1e3 * ours["ms"]["p50"] if "ms" in ours else None


def saved_per_token(rows: Rows, case: Case) -> float | None:
    saved = rows.get(OURS, {}).get("saved_bytes")
    return None if saved is None else saved / case.tokens


COPY = Goal("forward, over a copy of x", FORWARD, 1.65, over("copy"))
PACKED = tuple(
    Goal(f"{kind}, over the packed composition", kind, 1.0, over("eager-packed"))
    for kind in (FORWARD, BOTH)
)
GATE = Goal("forward+backward at 1/16 image tokens", BOTH, 60.0, microseconds, "us")


def _saved(rank: int) -> Goal:
    return Goal("saved for backward beyond x", BOTH, 4 * rank + 8, saved_per_token, "B/token")


def _gemm(bound: float) -> Goal:
    return Goal("forward, over the frozen product", FORWARD, bound, over("frozen-gemm"))


PROBLEMS = (
    Problem(
        adapter, (8192, 4096, 32), "plain", ("copy", "eager", "eager-packed", OURS),
        (
            COPY,
            Goal("forward+backward, over its byte floor", BOTH, 2.3, over_limit),
            _saved(32),
        ),
    ).with_cuda(1.3, 1.7, 136),
    Problem(adapter, (8192, 4096, 64), "plain", ("copy", OURS), (COPY,)).with_cuda(1.3),
    Problem(adapter, (32768, 4096, 64), "plain", ("copy", OURS), (COPY,)).with_cuda(1.3),
    Problem(adapter, (16384, 2048, 32), "plain", ("copy", OURS), (COPY,)).with_cuda(1.3),
    Problem(adapter, (8192, 4096, 32), "norm", ("copy", OURS), (COPY,)).with_cuda(1.3),
    Problem(routed, (8192, 4096, 32), "norm", ("copy", OURS), (COPY,)).with_cuda(1.3),
    *(
        Problem(
            routed, (8192, 4096, 32), variant, ("where", "eager-packed", "compile", OURS),
            (
                Goal(
                    "forward+backward, the better of both-experts eager and torch.compile over it",
                    BOTH, 7.0, speedup_over("where", "compile"), at_least=True,
                ),
                _saved(32),
            ),
        ).with_cuda(7.0, 136)
        for variant in ("input", "norm", "norm-frozen")
    ),
    Problem(
        adapter, (2048, 4096, 32), "plain", ("copy", OURS),
        (dataclasses.replace(COPY, bound=2.0),),
    ).with_cuda(2.0),
    Problem(
        adapter, (8192, 4096, 128), "plain", ("copy", "eager-packed", OURS), PACKED
    ).with_cuda(1.0, 1.0),
    Problem(
        adapter, (8192, 4096, 256), "plain", ("copy", "eager-packed", OURS), PACKED
    ).with_cuda(1.0, 1.0),
    Problem(
        gate, (8192, 32, 128), "projected", ("copy", "where", OURS, "triton-inplace"),
        (GATE, dataclasses.replace(GATE, text=f"{GATE.text}, in place", provider="triton-inplace")),
    ).with_cuda(60.0, 60.0, op="projected_modality_gate"),
    Problem(
        cp_linear, (8192, 4096, 64), "single", ("frozen-gemm", "gemm-addmm", OURS),
        (_gemm(1.06),),
    ).with_cuda(1.06, op="cp_linear"),
    Problem(
        cp_linear, (8192, 4096, 64), "group", ("frozen-gemm", "gemm-addmm", OURS),
        (_gemm(1.06),),
    ).with_cuda(1.06, op="cp_linear"),
    Problem(
        cp_linear, (16384, 768, 64), "single", ("frozen-gemm", "gemm-addmm", OURS),
        (_gemm(1.35),),
    ).with_cuda(1.35, op="cp_linear"),
)  # fmt: skip

BLOCK_GOALS = {
    "block": tuple(
        Goal(f"{kind}, over the frozen block{how}", kind, bound, over(yardstick), provider=ours)
        for kind, ours, yardstick, bound, how in (
            (BOTH, block.OURS, block.YARDSTICK, 1.0, ""),
            (BOTH, block.OURS_COMPILED, block.COMPILED_YARDSTICK, 1.05, ", both compiled"),
        )
    )
}
"""By suite: evaluated whenever the suite runs, since its cases take long."""


def run(
    machine: dict[str, Any],
    settings: Settings,
    record: Record,
    device: torch.device,
    problems: tuple[Problem, ...] = PROBLEMS,
) -> bool:
    """Measure every problem, record and print rows and goals; True if a provider failed."""
    found: list[dict[str, Any]] = []
    failed = False
    for problem in problems:
        kinds = tuple(k for k in settings.kinds if any(g.kind == k for g in problem.goals))
        providers = settings.providers or problem.providers
        own = dataclasses.replace(settings, kinds=kinds, providers=providers)
        try:
            case = problem.build(device)
            rows = measure(case, machine, own)
        except Exception as error:
            print(f"\n{problem.suite.__name__} {problem.shape}: FAILED {error}", flush=True)
            record.write({"kind": "failure", "suite": problem.suite.__name__, "why": str(error)})
            failed = True
            release()
            continue
        results = [result(goal, case, rows, settings.mode) for goal in problem.goals]
        record.write(*rows, *results)
        print(f"\n{table(rows)}", flush=True)
        failed |= any("failed" in row for row in rows)
        found += results
        del case
        release()
    print(f"\n{goal_table(found)}")
    return failed


def result(goal: Goal, case: Case, rows: list[dict[str, Any]], mode: str) -> dict[str, Any]:
    """One goal's record."""
    mine = {row["provider"]: row for row in rows if row["pass"] == goal.kind}
    ours = mine.get(goal.provider or OURS, {})
    value = goal.measured({**mine, OURS: ours}, case)
    return {
        "kind": "goal",
        "suite": case.suite,
        "case": case.label,
        "goal": goal.text,
        "provider": goal.provider or OURS,
        "mode": mode,
        "measured": value,
        "bound": goal.bound,
        "at_least": goal.at_least,
        "unit": goal.unit,
        "met": None if value is None else goal.verdict(value),
        "aa_spread": ours.get("aa_spread"),
        "why": None if value is not None else _why(ours, goal),
    }


def _why(ours: dict[str, Any], goal: Goal) -> str:
    return ours.get("skipped") or ours.get("failed") or "a provider it is compared with has no time"


def goal_table(goals: list[dict[str, Any]]) -> str:
    lines = []
    for g in goals:
        name = f"{g['suite']} {g['case']}: {g['goal']}"
        bound = f"{'>=' if g['at_least'] else '<='} {g['bound']:g} {g['unit']}"
        if g["measured"] is None:
            lines.append((name, bound, "not measured", g["why"][:120]))
        else:
            verdict = "met" if g["met"] else "NOT MET"
            lines.append((name, bound, f"{g['measured']:.2f} {g['unit']}", verdict))
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )
