"""SwiGLU adapter on the CPU: the C++ backend against eager torch, T=4096, d=1024, m=32, fp32."""

import pytest

from bench.interleave import interleaved_seconds, speedup
from bench.swiglu import PASSES, PROVIDERS, Problem, check

PROBLEM = Problem(tokens=4096, dim=1024, rank=32)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("kind", PASSES)
def test_time(benchmark, kind, provider):
    operands = PROBLEM.operands()
    check(provider, operands)
    benchmark.group = f"{kind} {PROBLEM}"
    benchmark.extra_info.update(provider=provider, forward_flops=PROBLEM.forward_flops)
    benchmark.pedantic(PASSES[kind](provider, operands), rounds=20, warmup_rounds=3)


@pytest.mark.parametrize("kind", PASSES)
def test_never_slower_than_eager(benchmark, kind):
    """All providers in turn, round by round: what counts on a machine that is not ours alone."""
    operands = PROBLEM.operands()
    functions = {name: PASSES[kind](name, operands) for name in PROVIDERS}
    functions["eager again"] = PASSES[kind]("eager", operands)
    seconds = interleaved_seconds(functions, rounds=40)
    benchmark.group = f"interleaved {kind} {PROBLEM}"
    benchmark.extra_info["speedup_over_eager"] = {
        name: speedup(seconds, name, "eager") for name in functions if name != "eager"
    }
    benchmark.extra_info["best_ms"] = {name: 1e3 * min(s) for name, s in seconds.items()}
    benchmark.pedantic(functions["cpu"], rounds=1)
    ours = benchmark.extra_info["speedup_over_eager"]["cpu"]
    assert ours["p50"] >= 1, ours
    assert ours["of_minima"] >= 1, ours
