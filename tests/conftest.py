"""For every test: offline libraries, bounded threads; on request: poisoned buffers."""

import os
import subprocess
import sys

# Before anything imports transformers, which reads these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

import mmadapt  # noqa: F401  (hides the folder kernels/ from libraries that probe for that name)

# Without a GPU the Triton kernels run in Triton's interpreter; read when triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# torch remembers on the first `with torch.device(...)` which functions it redirects. If that is
# while `poison_new_buffers` has replaced torch.empty, "meta" models take real memory ever after.
with torch.device("meta"):
    torch.empty(0)

# xdist runs one process per core; more threads than that only wait for each other.
torch.set_num_threads(1)


@pytest.fixture
def threads():
    """Setter for the number of threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def run_ranks():
    """Runner of `python worker rank *arguments` on every rank at once; all of them must succeed."""

    def run(worker, ranks, *arguments):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        processes = [
            subprocess.Popen(
                [sys.executable, str(worker), str(rank), *map(str, arguments)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(ranks)
        ]
        try:
            outputs = [process.communicate(timeout=240)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert [p.returncode for p in processes] == [0] * ranks, "\n".join(outputs)[-4000:]

    return run


@pytest.fixture
def poison_new_buffers(monkeypatch):
    """Buffers that mmadapt allocates start as NaN: whatever a kernel leaves unwritten shows up."""

    def poisoned(allocate):
        def allocate_poisoned(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith("mmadapt") and tensor.is_floating_point():
                tensor.fill_(float("nan"))
            return tensor

        return allocate_poisoned

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
