"""Helpers of the CUDA backends, without a GPU: where they can run, and what they say if not."""

from types import SimpleNamespace

import pytest
import torch

from mmadapt.ops._backends.cuda import _launch

ARCHS = "sm_80 sm_90a"


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0)])
def test_portable_kernels_run_from_sm_80_to_sm_90(capability):
    assert _launch.unsupported_capability(capability, ARCHS, hopper=False) is None


@pytest.mark.parametrize("capability", [(7, 5), (10, 0), (12, 0)])
def test_other_gpus_are_named(capability):
    reason = _launch.unsupported_capability(capability, ARCHS, hopper=False)
    assert reason == (
        f"compute capability {capability[0]}.{capability[1]}; "
        "the extension was compiled for sm_80, sm_90a"
    )


def test_ptx_runs_on_everything_later():
    for capability in ((9, 0), (10, 0), (12, 1)):
        assert _launch.unsupported_capability(capability, "sm_80 compute_90", False) is None
    assert _launch.unsupported_capability((8, 9), "compute_90", False) is not None
    assert _launch.unsupported_capability((10, 0), "compute_90a", False) is not None


def test_hopper_kernels_run_on_9_0_alone():
    assert _launch.unsupported_capability((9, 0), ARCHS, hopper=True) is None
    for capability, text in (((8, 0), "8.0"), ((10, 0), "10.0")):
        reason = _launch.unsupported_capability(capability, ARCHS, hopper=True)
        assert reason == f"compute capability {text}, needs 9.0"
    assert "no sm_90a code: sm_80" in _launch.unsupported_capability((9, 0), "sm_80", True)


def test_dtype_and_device_are_named():
    reason = _launch.unsupported_device("value", torch.empty(2, dtype=torch.float64))
    expected = "torch.float32 or torch.bfloat16 or torch.float16"
    assert reason == f"value is torch.float64, expected {expected}"
    reason = _launch.unsupported_device("value", torch.empty(2), dtypes=(torch.bfloat16,))
    assert reason == "value is torch.float32, expected torch.bfloat16"
    reason = _launch.unsupported_device("value", torch.empty(2))
    assert reason.startswith("value is on cpu, expected cuda")
    assert ("no GPU" in reason) != torch.cuda.is_available()
    on_meta = torch.empty(2, device="meta")
    assert _launch.unsupported_device("x", on_meta) == "x is on meta, expected cuda"


def test_address():
    x = torch.empty(4)
    assert _launch.address(x) == x.data_ptr() and _launch.address(None) == 0
    assert _launch.address(torch.empty(0)) == 0


@pytest.mark.parametrize(
    ("loaded", "text"),
    [
        ((None, "not built (no compiler)"), "mmadapt._C is not built"),
        ({"cuda_absent": "no nvcc"}, r"built without CUDA \(no nvcc\)"),
        ({}, r"built without CUDA \(it is older\)"),
    ],
)
def test_why_the_extension_has_no_kernels(monkeypatch, loaded, text):
    absent = isinstance(loaded, tuple)
    state = loaded if absent else (SimpleNamespace(build_info=lambda: loaded), "")
    monkeypatch.setattr(_launch, "load_extension", lambda: state)
    with pytest.raises(ImportError, match=text):
        _launch.extension()
