"""Two gloo processes, one of them with text alone, give the gradients of one process."""

import os
import subprocess
import sys
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
def test_two_processes(cases, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(tmp_path), *cases],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)[-4000:]
