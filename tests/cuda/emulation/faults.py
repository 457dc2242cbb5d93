"""Faults to plant into a copy of the kernels, each switched on by its number.

Every one is a race, a wrong count or a missing fence: on a GPU most of them go unnoticed for long.
"""

from tests.cuda.emulation.build import Edit

WARPGROUP = "swiglu_adapter/warpgroup.cuh"
EXCHANGE = "swiglu_adapter/exchange.cuh"

FAULTS: dict[str, Edit] = {
    "a lane releases a stage that others still read": (
        WARPGROUP,
        "__syncwarp();  // one lane releases the stage for all",
        "if (!PLANTED) __syncwarp();",
    ),
    "the product before is not waited for": (
        WARPGROUP,
        "wgmma_wait<1>();  // the product before: its stage is free",
        "if (!PLANTED) wgmma_wait<1>();",
    ),
    "weights are released before the product has read them": (
        WARPGROUP,
        "wgmma_wait<0>();\n      release(weights.empty_barrier(), w.lane);\n      weights.advance",
        "if (!PLANTED) wgmma_wait<0>();\n      release(weights.empty_barrier(), w.lane);\n"
        "      if (PLANTED) wgmma_wait<0>();\n      weights.advance",
    ),
    "no fence before the TMA store": (
        WARPGROUP,
        "fence_async_proxy();\n    named_barrier(1",
        "if (!PLANTED) fence_async_proxy();\n    named_barrier(1",
    ),
    "a stage is refilled while a TMA store reads it": (
        WARPGROUP,
        "tma_wait_read<1>();\n",
        "if (!PLANTED) tma_wait_read<1>();\n",
    ),
    "a ring of one stage waits for its next": (
        WARPGROUP,
        "return p.stages == 1 || p.weight_stages == 1;",
        "return !PLANTED && (p.stages == 1 || p.weight_stages == 1);",
    ),
    "fewer bytes of weights are expected than come": (
        "swiglu_adapter/load.cuh",
        "barrier_expect(ring.full_barrier(), S::kGateDownBytes);",
        "barrier_expect(ring.full_barrier(), S::kGateDownBytes / (PLANTED ? 2 : 1));",
    ),
    "bytes of another round are expected": (
        EXCHANGE,
        "expect_sums(p, w, x, round + 1 < x.own_rounds ? round + 1 : 0);",
        "expect_sums(p, w, x, !PLANTED && round + 1 < x.own_rounds ? round + 1 : 0);",
    ),
    "sums are sent to a block whose barriers are not there": (
        "swiglu_adapter/kernel.cuh",
        "if (n == 0) cluster_wait();  // every block's barriers are there\n"
        "      exchange<T>(sums, row_sums, a, w, r, tile);",
        "if (n == 0 && !PLANTED) cluster_wait();\n"
        "      exchange<T>(sums, row_sums, a, w, r, tile);\n"
        "      if (n == 0 && PLANTED) cluster_wait();",
    ),
}


def edits() -> tuple[Edit, ...]:
    """All of them; number 0 is none."""
    return tuple(
        (file, text, other.replace("PLANTED", f"(machine_planted == {number})"))
        for number, (file, text, other) in enumerate(FAULTS.values(), 1)
    )
