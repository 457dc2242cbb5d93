"""Two gloo processes give the gradients of one, with the shared factors whole on every rank."""

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
def test_two_processes(cases, tmp_path, run_ranks):
    run_ranks(WORKER, 2, tmp_path, *cases)
