"""Which tile settings a call gets, and that the shipped tables hold what the launchers read."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from mmadapt.ops._backends.triton import _configs, cp_linear

DEFAULT, MINE = {"BM": 16}, {"BM": 64}
BF16 = torch.empty(1, dtype=torch.bfloat16)
SHIPPED = sorted(Path(_configs.__file__).with_name("configs").glob("*.json"))


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """Writer of a user's table and a shipped one, for a CPU that answers as `sm_77`."""
    caches = _configs.entries, _configs._nearest
    monkeypatch.setattr(_configs, "_architecture", lambda device: "sm_77")
    monkeypatch.setattr(_configs, "_FOLDER", tmp_path)

    def write(shipped=(), user=None, architecture="sm_77"):
        def table(path, found):
            path.write_text(json.dumps({"architecture": architecture, "entries": list(found)}))

        table(tmp_path / "sm_77.json", shipped)
        if user is not None:
            table(tmp_path / "mine.json", user)
            monkeypatch.setenv(_configs.ENVIRONMENT_VARIABLE, str(tmp_path / "mine.json"))
        for cache in caches:
            cache.cache_clear()

    monkeypatch.delenv(_configs.ENVIRONMENT_VARIABLE, raising=False)
    yield write
    for cache in caches:
        cache.cache_clear()


def entry(config, kernel="k", dtype="bfloat16", **dims):
    return {"kernel": kernel, "dtype": dtype, "dims": dims, "config": config}


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(1000, MINE), (500, MINE), (2000, MINE), (499, DEFAULT), (2001, DEFAULT), (0, DEFAULT)],
)
def test_every_dim_within_a_factor_of_2(tables, tokens, expected):
    tables([entry(MINE, tokens=1000, dim=64)])
    assert _configs.tiles("k", BF16, DEFAULT, tokens=tokens, dim=64) == expected
    assert _configs.tiles("k", BF16, DEFAULT, tokens=tokens, dim=129) == DEFAULT


def test_the_nearest_of_several(tables):
    tables([entry({"BM": n}, tokens=n, dim=64) for n in (512, 1024, 2048)])
    for tokens, nearest in ((700, 512), (760, 1024), (1100, 1024), (1500, 2048), (4000, 2048)):
        assert _configs.tiles("k", BF16, DEFAULT, tokens=tokens, dim=64) == {"BM": nearest}


def test_kernel_dtype_and_names_of_dims_must_be_the_same(tables):
    tables([entry(MINE, tokens=8)])
    assert _configs.tiles("k", BF16, DEFAULT, tokens=8) == MINE
    assert _configs.tiles("kk", BF16, DEFAULT, tokens=8) == DEFAULT
    assert _configs.tiles("k", BF16.half(), DEFAULT, tokens=8) == DEFAULT
    assert _configs.tiles("k", BF16, DEFAULT, rows=8) == DEFAULT
    assert _configs.tiles("k", BF16, DEFAULT, tokens=8, dim=8) == DEFAULT


def test_the_users_table_is_before_the_shipped_one(tables):
    far = entry({"BM": 3}, tokens=16)
    tables([entry({"BM": 1}, tokens=8), far], [entry({"BM": 2}, tokens=8)])
    assert _configs.tiles("k", BF16, DEFAULT, tokens=8) == {"BM": 2}
    assert _configs.tiles("k", BF16, DEFAULT, tokens=16) == {"BM": 3}


def test_a_table_of_another_architecture_or_none_at_all(tables, monkeypatch, tmp_path):
    tables([entry(MINE, tokens=8)], [entry(MINE, tokens=8)], architecture="sm_78")
    assert _configs.tiles("k", BF16, DEFAULT, tokens=8) == DEFAULT
    monkeypatch.setenv(_configs.ENVIRONMENT_VARIABLE, str(tmp_path / "nowhere.json"))
    monkeypatch.setattr(_configs, "_architecture", lambda device: "sm_unknown")
    assert _configs.tiles("k", BF16, DEFAULT, tokens=8) == DEFAULT


def test_override_names_kernels_nests_and_ends(tables):
    tables([entry(MINE, tokens=8)])

    def found():
        return _configs.tiles("k", BF16, DEFAULT, tokens=8)["BM"]

    with _configs.override({"k": {"BM": 1}}):
        with _configs.override({"other": {"BM": 2}}):
            assert found() == 1
        with _configs.override({"k": {"BM": 3}}):
            assert found() == 3
        assert found() == 1
        with pytest.raises(KeyError), _configs.override({"k": {"BM": 4}}):
            raise KeyError
        assert found() == 1
    assert found() == MINE["BM"]


PASSES = {"fused", "BM", "BK", "BN", "warps", "stages_k", "stages_n"}
VALUE = {"BT", "HB", "BC", "BW", "num_warps"}
KEYS = {
    "swiglu_adapter.forward": PASSES,
    "swiglu_adapter.backward": PASSES,
    "swiglu_adapter.weights": {"BD", "BC", "BT", "programs", "warps", "stages"},
    "modality_gate_fwd": VALUE,
    "modality_gate_bwd": VALUE,
    "projected_modality_gate_fwd": VALUE | {"BK", "STAGES"},
    "projected_modality_gate_bwd": {"BT", "BD", "BH", "RUNS", "num_warps"},
}
"""What launchers read without a default of their own."""
DIMS = {
    "swiglu_adapter": {"tokens", "dim", "rank", "experts"},
    "modality_gate": {"heads", "size"},
    "projected_modality_gate_fwd": {"heads", "size", "width"},
    "projected_modality_gate_bwd": {"heads", "width"},
}
NUMBERS = {"fused", "tiled", "tma", "halves", "persistent", "specialize", "path", "gemm_first"}
NUMBERS |= {"overlap"}  # those that may be 0


def test_the_tables_are_shipped():
    assert "sm_90" in {path.stem for path in SHIPPED}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_tables_are_what_launchers_read(path):
    table = json.loads(path.read_text(encoding="utf-8"))
    assert table["architecture"] == path.stem
    seen = set()
    for found in table["entries"]:
        kernel, dims, config = found["kernel"], found["dims"], found["config"]
        where = f"{kernel} {found['dtype']} {dims}"
        assert found["dtype"] in ("bfloat16", "float16", "float32"), where
        key = (kernel, found["dtype"], *sorted(dims.items()))
        assert key not in seen, f"{where} twice"
        seen.add(key)
        assert all(isinstance(n, int) and n > 0 for n in dims.values()), where
        for name, value in config.items():
            assert isinstance(value, int) and value >= (name not in NUMBERS), (where, name)
            assert value & (value - 1) == 0 or not name.startswith(("B", "b")), (where, name)
        if kernel in cp_linear.SPACES:
            # cp_linear completes settings by its defaults: what must hold is that it knows them.
            known = {name for space in cp_linear.SPACES[kernel] for name in space}
            assert config.keys() <= known | {"split"}, where
            assert {"T", "R"} < dims.keys() and dims.keys() <= {"T", "d", "d_in", "d_out", "R", "K"}
            continue
        assert kernel in KEYS, where
        needed = KEYS[kernel]
        if config.get("fused") == 0:
            needed = needed | {"BR", "splits", "groups"}
        assert needed <= config.keys() <= needed | {"tiled"}, where
        (names,) = [d for k, d in DIMS.items() if kernel.startswith(k)]
        assert dims.keys() == names, where
