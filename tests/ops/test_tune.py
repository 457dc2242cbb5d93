"""The tuner without a GPU: its arguments, its files, and what it would walk."""

import json

import pytest
import torch

pytest.importorskip("triton")

from mmadapt.ops import tune
from mmadapt.ops._backends.triton import cp_linear, swiglu_adapter
from mmadapt.ops._backends.triton._configs import override, tiles
from mmadapt.ops._backends.triton._device import INTERPRETED


@pytest.fixture
def sm_77(monkeypatch):
    """A GPU that can be asked for its name and nothing else."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 7))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cp_linear", "--out", "o.json"], "--sizes"),
        (["cp_linear", "--sizes", "8x8x8"], "--out"),
        (["nothing", "--sizes", "8x8x8", "--out", "o.json"], "invalid choice: 'nothing'"),
        (["cp_linear", "--sizes", "8x8", "--out", "o.json"], "expected AxBxC"),
        (["cp_linear", "--sizes", "8x0x8", "--out", "o.json"], "positive numbers, got 8x0x8"),
        (["cp_linear", "--sizes", "8x8x8", "--out", "o.json", "--dtype", "int8"], "int8"),
    ],
)
def test_argument_errors(sm_77, capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        tune.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "mine.json"
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        tune.main(["swiglu_adapter", "--sizes", "8x8x8", "--out", str(out)])
    assert not out.exists()


def test_a_contract_whose_backend_is_missing(monkeypatch):
    monkeypatch.setattr(tune, "load", lambda path: "not built")
    with pytest.raises(SystemExit, match="Triton backend of cp_linear is not built"):
        tune.targets("cp_linear", [(8, 8, 8)], torch.bfloat16)


def entry(config, kernel="k", dtype="bfloat16", **dims):
    return {"kernel": kernel, "dtype": dtype, "dims": dims, "config": config}


def test_write_merges(sm_77, tmp_path):
    out = tmp_path / "mine.json"
    tune.write(out, [entry({"BM": 1}, a=1, b=2), entry({"BM": 2}, a=2, b=2)])
    tune.write(out, [entry({"BM": 3}, b=2, a=1), entry({"BM": 4}, dtype="float32", a=1, b=2)])
    table = json.loads(out.read_text())
    assert table["architecture"] == "sm_77" and table["gpu"] == "a GPU"
    found = {(e["dtype"], e["dims"]["a"]): e["config"]["BM"] for e in table["entries"]}
    assert found == {("bfloat16", 1): 3, ("bfloat16", 2): 2, ("float32", 1): 4}
    assert len(table["entries"]) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["mine.json"]


def test_write_refuses_the_file_of_another_gpu(sm_77, tmp_path):
    out = tmp_path / "mine.json"
    out.write_text(before := json.dumps({"architecture": "sm_90", "entries": []}))
    with pytest.raises(SystemExit, match="holds sm_90, this GPU is sm_77"):
        tune.write(out, [entry({"BM": 1}, a=1)])
    assert out.read_text() == before


BACKENDS = {"swiglu_adapter": swiglu_adapter, "cp_linear": cp_linear}


def test_every_tunable_contract_is_here():
    assert set(tune.CONTRACTS) == set(BACKENDS)


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
@pytest.mark.parametrize("contract", BACKENDS)
def test_targets_are_complete_and_run(contract, monkeypatch):
    """Every target has distinct candidates, dims that its kernel is looked up by, and runs."""
    found = [
        tune.Target(*target)
        for target in BACKENDS[contract].tuning_targets((9, 32, 16), torch.float32, "cpu")
    ]
    keys = [(t.kernel, *sorted(t.dims.items())) for t in found]
    assert found and len(set(keys)) == len(keys)
    looked_up = []

    def spy(kernel, x, default, **dims):
        looked_up.append((kernel, *sorted(dims)))
        return tiles(kernel, x, default, **dims)

    monkeypatch.setattr(BACKENDS[contract], "tiles", spy)
    small = {"bm": 16, "bn": 16, "bk": 16} if contract == "cp_linear" else {}
    for target in found:
        assert target.kernel.startswith(f"{contract}.")
        assert all(isinstance(n, int) and n > 0 for n in target.dims.values())
        assert target.candidates
        assert len({tuple(sorted(c.items())) for c in target.candidates}) == len(target.candidates)
        looked_up.clear()
        first = target.candidates[0]
        with override({target.kernel: {**first, **small} if "bm" in first else first}):
            assert all(t.isfinite().all() for t in target.run())
        assert (target.kernel, *sorted(target.dims)) in looked_up
