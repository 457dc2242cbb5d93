"""The Hopper kernels of swiglu_adapter on the CPU, under schedules that a GPU rarely shows."""

import fcntl
import itertools

import pytest
import torch

from tests.cuda.emulation import build
from tests.cuda.emulation.adapter import Case, EmulationError, Kernels, Problem
from tests.cuda.emulation.faults import FAULTS, edits

MISSING = build.missing()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

DIRECTIONS = ("forward", "dx")
FP16 = torch.float16

# tokens, dim, rank, cluster, rows of a tile; ragged rows and columns, mostly two tiles.
CASES = [
    Case(115, 72, 16, 2, 64),
    Case(243, 72, 32, 2, 128, norm=True, residual="norm"),
    Case(300, 136, 24, 2, 256, experts=2, norm=True),
    Case(115, 520, 40, 4, 64, norm=True, residual="norm"),
    Case(243, 264, 64, 4, 128, experts=3, shared_up=True),
    Case(115, 264, 64, 4, 64, experts=2, norm=True, residual="none"),
    Case(115, 264, 72, 4, 64, norm=True, residual="norm"),  # rings of one stage
    Case(150, 72, 128, 2, 128, experts=2, residual="none"),
    Case(1, 8, 8, 2, 64, experts=1, norm=True, residual="norm", runs=1),
]
# Chunks leave rings of several stages and come again; rings of one stage.
SEVERAL = Case(115, 1032, 72, 2, 64, norm=True, residual="norm")
ONE = Case(115, 520, 72, 4, 64, norm=True, residual="norm")


@pytest.fixture(scope="session")
def built(tmp_path_factory, worker_id):
    """Libraries by name, each compiled by one process for all."""
    base = tmp_path_factory.getbasetemp()
    base = (base if worker_id == "master" else base.parent) / "emulation"
    base.mkdir(exist_ok=True)
    variants = {
        "bf16": (DIRECTIONS, (build.WITHOUT_FP16,)),
        "all": (DIRECTIONS, ()),
        "faults": (("forward",), (build.WITHOUT_FP16, build.FROM_72_RANKS, *edits())),
    }

    def library(name):
        with open(base / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            machine = build.build_machine(base / "machine")
            return Kernels(build.build(base / name, machine, *variants[name]))

    return library


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_under_several_schedules(built, case, direction):
    built("bf16").check(direction, Problem(case), range(3))


@pytest.mark.parametrize("case", [SEVERAL, ONE], ids=str)
def test_without_faults_the_edited_kernels_are_right(built, case):
    built("faults").check("forward", Problem(case), range(5))


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(built, fault):
    kernels = built("faults")
    problems = [Problem(case) for case in (SEVERAL, ONE)]
    kernels.plant(list(FAULTS).index(fault) + 1)
    try:
        with pytest.raises(EmulationError):
            for seed, problem in itertools.product(range(0, 60, 5), problems):
                kernels.check("forward", problem, range(seed, seed + 5))
    finally:
        kernels.plant(0)


def test_a_launch_is_refused_as_on_a_gpu(built):
    with pytest.raises(EmulationError, match="rank: expected a multiple of 8"):
        built("bf16").run("forward", Problem(Case(4, 64, 12, 2, 64)), 0)


@pytest.mark.slow
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("rank", [16, 32, 40, 64, 72, 128])
def test_many_shapes(built, rank, direction):
    kernels = built("all")
    shapes = [(72, 2), (520, 4)]
    settings = [(False, "input"), (True, "input"), (True, "norm"), (True, "none")]
    for (dim, cluster), rows, (norm, residual), experts in itertools.product(
        shapes, (64, 128, 256), settings, (0, 2)
    ):
        if rows == 256 and rank > 32:
            continue
        dtype = FP16 if residual == "none" else torch.bfloat16
        wide = torch.float32 if experts and norm else dtype
        case = Case(2 * rows - 13, dim, rank, cluster, rows, experts, norm=norm, residual=residual)
        case.dtype, case.weight_dtype = dtype, wide
        try:
            kernels.check(direction, Problem(case), range(2))
        except EmulationError as error:
            if "no such tile" not in str(error):
                raise
