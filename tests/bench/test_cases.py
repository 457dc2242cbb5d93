"""Every suite builds, every provider computes the same thing, inputs rotate, memory is counted."""

import pytest
import torch

from bench import goals, probes
from bench.case import BACKWARD, BOTH, FORWARD, KINDS, registered
from bench.cases import adapter, cp_linear, gate, image_of, is_image, parse_variant, routed
from bench.gate import Gate
from bench.run import SUITES, suite
from tests.bench.conftest import CPU

SMALL = {
    "adapter": (48, 16, 8),
    "routed": (48, 16, 8),
    "gate": (64, 4, 8),
    "cp_linear": (40, 24, 4),
    "block": (2, 24, 32, 4),
    "vit_block": (2, 9, 64, 8),
}
VARIANTS = [(name, variant) for name in SUITES for variant in suite(name).VARIANTS]


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_every_provider_computes_the_formula(name, variant):
    case = suite(name).build(SMALL[name], variant, torch.bfloat16, CPU)
    gate = Gate(case)
    run = 0
    for provider, entry in case.providers.items():
        if entry.compiled or entry.skip is not None:
            continue
        for kind in entry.kinds:
            call = case.make(provider, kind)
            call(0)
            results = call(0)  # a backward alone runs on the same forward again
            if entry.gated:
                gate.check(results, kind)
                run += 1
    assert run >= 2 * len(KINDS)
    assert set(case.moved) == set(case.flops) == set(KINDS)
    assert case.cost(BACKWARD)[0] == case.moved[BOTH] - case.moved[FORWARD]
    assert 0 < case.moved[FORWARD] < case.moved[BOTH]
    assert 0 < case.flops[FORWARD] < case.flops[BOTH]


def test_defaults_are_variants():
    for name in SUITES:
        module = suite(name)
        assert set(module.DEFAULT_VARIANTS) <= set(module.VARIANTS)
        assert {"default", "subset"} <= module.GRIDS.keys()
        for grid in module.GRIDS.values():
            assert grid and all(len(shape) in module.LENGTHS for shape in grid)


def test_variants_are_parsed():
    found = parse_variant("norm-fp32-E4", ("norm",), ("fp32",), ("E",))
    assert (found.kind, found.flags, found.numbers) == ("norm", {"fp32"}, {"E": 4})
    assert "fp32" in found and found.get("run", 32) == 32
    for text in ("other", "norm-fp64", "norm-4", "norm-run8"):
        with pytest.raises(ValueError, match=text.rpartition("-")[2]):
            parse_variant(text, ("norm",), ("fp32",), ("E",))


@pytest.mark.parametrize(("percent", "share"), [(0, 0.0), (50, 0.5), (100, 1.0)])
def test_share_and_runs_of_image_tokens(percent, share):
    options = routed.parse(f"norm-image{percent}-run8")
    image = image_of(options, 4096, CPU)
    assert image.float().mean() == share
    if percent == 50:
        assert image[:8].all() and not image[8:16].any()


def test_experts_take_turns_by_run():
    ids = routed.experts_of(routed.parse("norm-E4-image50-run8"), 64, CPU)
    assert ids.view(8, 8)[:, 0].tolist() == [1, 0, 2, 0, 3, 0, 1, 0]
    assert routed.experts_of(routed.parse("norm-E1"), 64, CPU).max() == 0


def test_a_backend_that_is_missing_here_says_why():
    case = adapter.build(SMALL["adapter"], "plain", torch.bfloat16, CPU)
    assert "interpreter" in case.providers["triton"].skip
    assert case.providers["reference"].skip is None
    assert case.providers["compile-max"].optional


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_backend_of_another_device_is_skipped_with_the_reason(monkeypatch, kind):
    present = dict.fromkeys(("cpu", "cuda", "triton", "reference"))
    monkeypatch.setattr("bench.case.backends", lambda op: present)
    providers = registered("swiglu_adapter", lambda name: torch.relu, torch.device(kind))
    skipped = {name for name, provider in providers.items() if provider.skip is not None}
    assert skipped == ({"cuda", "triton"} if kind == "cpu" else {"cpu"})


def test_pefts_lora_is_the_formula_without_a_mode():
    case = cp_linear.build((40, 24, 16, 4), "group", torch.float32, CPU)
    tensors = case.tensors(0)
    plain = {n: torch.ones_like(t) if n.startswith("mode") else t for n, t in tensors.items()}
    ours = case.providers["eager"].function(**plain)
    theirs = case.providers["peft-lora"].function(**tensors)
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(a, b)


def test_inputs_rotate_until_they_exceed_the_cache(case):
    x = case.activations["x"]
    case.rotate(FORWARD, 5 * x.nbytes)
    assert len(case.slots) == len(case.dys) == 5
    assert len({slot["x"].data_ptr() for slot in case.slots}) == 5
    assert all(torch.equal(slot["x"], x) and slot["x"].requires_grad for slot in case.slots)
    case.rotate(BOTH, 5 * x.nbytes)
    assert len(case.slots) == 5
    first, last = (case.make("eager", BOTH)(slot) for slot in (0, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, last, strict=True))


def test_weights_are_the_same_in_every_call(case):
    case.rotate(BOTH, 10**6)
    assert case.tensors(0)["gate"] is case.tensors(1)["gate"]


def test_image_tokens_come_in_runs():
    image = is_image(1024, CPU)
    assert image[:32].all() and not image[32:512].any() and image[512:544].all()


def test_the_frozen_product_differentiates_x_only():
    case = cp_linear.build(SMALL["cp_linear"], "group", torch.bfloat16, CPU)
    results = case.make("frozen-gemm", BOTH)(0)
    assert [r is None for r in results] == [False] * 4 + [True] * 5


def test_saved_bytes_leave_out_what_the_caller_holds():
    case = routed.build((48, 16, 8), "norm", torch.bfloat16, CPU)
    # Pre-activations of gate and down in bf16, the norm's statistics in fp32.
    assert probes.saved_bytes(case, "reference") == 48 * (2 * 8 * 2 + 4)
    assert probes.saved_bytes(case, "where") > 48 * (2 * 8 * 2 + 4)


def test_probes_without_a_gpu(case):
    assert probes.launches(case.make("eager", BOTH), CPU) is None
    assert probes.memory(case, "eager", FORWARD) == {"peak_bytes": None, "saved_bytes": None}


@pytest.mark.parametrize("variant", gate.DEFAULT_VARIANTS)
def test_what_overwrites_its_input_gets_its_own(variant):
    case = gate.build(SMALL["gate"], variant, torch.bfloat16, CPU)
    contract = {"static": "modality_gate", "projected": "projected_modality_gate"}[variant]
    case.providers["inplace"] = gate.inplace(contract, variant == "projected", "reference")
    if case.providers["inplace"].skip:
        pytest.skip(case.providers["inplace"].skip)
    before, checks = case.activations["value"].clone(), Gate(case)
    for kind in case.providers["inplace"].kinds:
        call = case.make("inplace", kind)
        checks.check(call(0), kind)
        assert call(0)[0].abs().sum() < before.abs().sum()
    probes.saved_bytes(case, "inplace")
    assert torch.equal(case.activations["value"], before)


def test_bytes_of_the_gate_grow_with_what_it_returns():
    static, projected = (
        gate.build(SMALL["gate"], v, torch.bfloat16, CPU) for v in ("static", "projected")
    )
    assert static.moved[FORWARD] == 2 * 2 * 64 * 32
    assert projected.moved[BOTH] > static.moved[BOTH]


def test_goals_name_providers_that_exist():
    small = {p.suite.__name__.rpartition(".")[2]: p for p in goals.PROBLEMS}
    for name, problem in small.items():
        case = problem.suite.build(SMALL[name], problem.variant, torch.bfloat16, CPU)
        assert case.providers.keys() >= {goals.OURS}
        for each in goals.PROBLEMS:
            if each.suite is problem.suite:
                assert set(each.providers) <= case.providers.keys()
                assert each.goals
