"""Two gloo processes give the gradients of one, with the shared factors whole on every rank."""

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
        ["ddp:retrieval", "layers:retrieval", "root:retrieval"],
        pytest.param(
            ["ddp:vqa", "layers:vqa", "root:vqa", "ddp:llava", "layers:llama", "root:llama"],
            marks=pytest.mark.slow,
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
