"""Thread count of the run and what its record says about the machine."""

import os

import pytest
import torch

import mmadapt


def pytest_configure():
    torch.set_num_threads(int(os.environ.get("MMADAPT_BENCH_THREADS", "2")))


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.pop("node", None)
    with open(os.devnull, "w") as nowhere:
        machine_info["mmadapt"] = mmadapt.show_config(nowhere)
    machine_info["threads"] = torch.get_num_threads()
    machine_info["load_average"] = os.getloadavg()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
