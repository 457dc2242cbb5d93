"""Several gloo processes give the losses, gradients, queues and scores of one process."""

from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_equal_one_process(ranks, tmp_path, run_ranks):
    run_ranks(WORKER, ranks, ranks, tmp_path)
