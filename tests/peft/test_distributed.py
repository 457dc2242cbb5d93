"""Two gloo processes, one of them with text alone, give the gradients of one process."""

from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("distributed_worker.py")


# Cases of one list share two processes: starting them costs more than running them.
@pytest.mark.parametrize(
    "cases",
    [
        ["ddp:instruct", "fsdp2:instruct", "ddp_without_pixels:align"],
        ["fsdp2_norms:instruct", "fsdp2_norms_by_layer:instruct"],
        pytest.param(
            ["ddp:align", "fsdp2:align", "ddp_without_pixels:instruct"], marks=pytest.mark.slow
        ),
    ],
)
def test_two_processes(cases, tmp_path, run_ranks):
    run_ranks(WORKER, 2, tmp_path, *cases)
