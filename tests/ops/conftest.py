"""Inputs, tolerances and golden files shared by the operator tests."""

import functools
import inspect
import os
import sys
from pathlib import Path

import pytest
import torch

from mmadapt.ops import backends


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _quicker_interpreter():
    """Triton's interpreter goes through all of triton.language in every call of a device function,
    to patch its builtins, a third of the time of these tests; here it goes through their names."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None:
        yield
        return
    is_builtin = interpreter.tl.core.is_builtin

    @functools.cache
    def names(package):
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def patch_builtin(package, builder, scope):
        for name in names(package):
            if is_builtin(member := getattr(package, name)):
                interpreter._patch_attr(package, name, member, builder, scope)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_builtin", patch_builtin)
        yield


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """Every backend of swiglu_adapter; a missing extension skips, but fails where CI is set."""
    reason = backends("swiglu_adapter")[request.param]
    if reason is not None:
        if os.environ.get("CI"):
            pytest.fail(f"backend {request.param}: {reason}")
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


@pytest.fixture
def swiglu():
    """Factory of random operands ``x, gate, down, up`` and, with `norm`, the norm weight."""

    def operands(
        tokens=11,
        dim=24,
        rank=5,
        experts=2,
        share_up=False,
        norm=False,
        dtype=torch.float64,
        weight_dtype=None,
    ):
        ups = 1 if share_up else experts
        shapes = [(experts, rank, dim), (experts, rank, dim), (ups, dim, rank)]
        shapes += [(dim,)] if norm else []
        x = torch.randn(tokens, dim, dtype=torch.float64).to(dtype)
        weights = [(torch.randn(s) / s[-1] ** 0.5).to(weight_dtype or dtype) for s in shapes]
        return [t.requires_grad_() for t in (x, *weights)]

    return operands


@pytest.fixture
def assert_as_good_as_eager():
    """Error against fp64 at most twice that of eager torch in the same dtype, plus a rounding unit.

    Checked for the root mean square, and for the largest error unless `largest` is false: among a
    handful of values it is the luck of eager's roundings.
    """

    def check(actual, eager, exact, largest=True):
        assert actual.dtype == eager.dtype
        assert actual.shape == exact.shape
        assert torch.isfinite(actual).all()
        if exact.numel() == 0:
            return
        unit = torch.finfo(eager.dtype).eps
        ours, theirs = (actual.double() - exact).abs(), (eager.double() - exact).abs()
        if largest:
            assert ours.max() <= 2 * theirs.max() + unit * exact.abs().max()
        rms = exact.square().mean().sqrt()
        assert ours.square().mean().sqrt() <= 2 * theirs.square().mean().sqrt() + unit * rms

    return check


@pytest.fixture
def golden():
    """Reader: ``(params, inputs, parameter grads, input grads, output, grad_output)``, fp32."""
    load_file = pytest.importorskip("safetensors.torch").load_file
    folder = Path(__file__).parent.parent / "golden"

    def load(name):
        tensors = load_file(folder / f"{name}.safetensors")
        groups = {"param.": {}, "input.": {}, "grad.": {}, "grad_input.": {}}
        for key, tensor in tensors.items():
            for prefix, group in groups.items():
                if key.startswith(prefix):
                    group[key[len(prefix) :]] = tensor
        return (*groups.values(), tensors["output"], tensors["grad_output"])

    return load


@pytest.fixture
def assert_close():
    """Relative L2 error below a bound."""

    def check(actual, expected, bound):
        error = (actual - expected).norm() / expected.norm()
        assert error <= bound, f"relative error {error:.2e} > {bound:.0e}"

    return check
