"""Statistics and interleaving."""

import pytest
import torch

from bench import timing


def test_quantiles_interpolate():
    values = [3.0, 1.0, 2.0, 4.0, 5.0]
    assert timing.quantile(values, 0.5) == 3.0
    assert timing.quantile(values, 0.2) == pytest.approx(1.8)
    assert timing.spread(values) == pytest.approx({"p20": 1.8, "p50": 3.0, "p80": 4.2})
    assert timing.quantile([7.0], 0.8) == 7.0


def test_ratios_are_of_the_same_round():
    slow_machine = [1.0, 2.0, 4.0]
    assert timing.ratios([2.0, 4.0, 8.0], slow_machine)["p50"] == 2.0
    assert timing.what_counts([1.0, 2.1, 3.6], slow_machine) == pytest.approx(0.06)


class Counted:
    def __init__(self, name, log):
        self.name, self.log, self.calls = name, log, 1

    def start(self):
        self.log.append(self.name)
        return lambda: float(len(self.name))


def test_rounds_start_with_the_next_one():
    log = []
    timers = {name: Counted(name, log) for name in ("a", "bb", "ccc")}
    seconds = timing.interleave(timers, rounds=4, warmup_seconds=0.0)
    assert log[3:] == ["a", "bb", "ccc", "bb", "ccc", "a", "ccc", "a", "bb", "a", "bb", "ccc"]
    assert seconds == {"a": [1.0] * 4, "bb": [2.0] * 4, "ccc": [3.0] * 4}


def test_eager_timer_rotates():
    slots = []
    read = timing.EagerTimer(slots.append, 2, calls=4).start()
    assert slots == [0, 1, 0, 0, 1, 0, 1]
    assert 0 < read() < 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graph_timer_agrees_with_the_bytes_it_moves():
    source = [torch.randn(2**26, device="cuda") for _ in range(2)]
    target = torch.empty_like(source[0])
    timer = timing.GraphTimer(lambda slot: target.copy_(source[slot]), 2)
    seconds = timing.interleave({"copy": timer}, 10)["copy"]
    rate = 2 * target.nbytes / timing.quantile(seconds, 0.5)
    assert 1e11 < rate < 1e13


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graph_timer_captures_a_backward():
    x = torch.randn(512, 512, device="cuda", requires_grad=True)
    w = torch.randn(512, 512, device="cuda", requires_grad=True)

    def call(slot):
        return torch.autograd.grad((x @ w).tanh().sum(), (x, w))

    timer = timing.GraphTimer(call, 2)
    assert timer.calls % 2 == 0
    assert timing.interleave({"call": timer}, 3, 0.0)["call"][0] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graph_timer_captures_a_backward_of_an_earlier_forward():
    x = torch.randn(512, 512, device="cuda", requires_grad=True)
    made = {}

    def call(slot):
        if slot not in made:
            made[slot] = (x @ x).tanh().sum()
        return torch.autograd.grad(made[slot], x, retain_graph=True)

    timer = timing.GraphTimer(call, 2)
    assert len(made) == 2
    assert timing.interleave({"call": timer}, 3, 0.0)["call"][0] > 0
