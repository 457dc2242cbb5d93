"""FSDP2 in two processes: the losses of one process with both batches."""

import shlex

import pytest

from bench import fsdp, report

TINY = shlex.split(
    "--processes 2 --geometry tiny --batch 1 --length 40 --rank 4 --dtype fp32 --steps 2 --rounds 1"
)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pill", "lora"])
def test_losses_are_those_of_one_process(tmp_path, method):
    arguments = [*TINY, "--method", method, "--device", "cpu", "--out", str(tmp_path)]
    assert fsdp.main([*arguments, "--commit", "abc1234"]) == 0
    _, row = report.read(next(tmp_path.iterdir()))
    assert row["losses_apart"] < 1e-5
    assert len(row["losses"]["many"]) == 2
    assert row["losses"]["many"][0] != row["losses"]["many"][1]
    assert row["efficiency"] > 0


def test_losses_that_differ_fail():
    arguments = fsdp.parser().parse_args(TINY)
    timed = {"seconds": {"p50": 1.0}, "peak_bytes": None}
    results = {1: {"losses": [1.0, 0.5], **timed}, 2: {"losses": [1.0, 0.6], **timed}}
    row = fsdp.compared(arguments, results, "cpu")
    assert "losses differ" in row["failed"]
    assert "FAILED" in fsdp.text(row)


def test_more_processes_than_gpus():
    with pytest.raises(SystemExit, match="need as many GPUs"):
        fsdp.main(["--processes", "64", "--device", "cuda"])
