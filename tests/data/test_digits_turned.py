"""The turned set: the questions of single scans, every scan upside down."""

import json

import numpy as np
import pytest
from PIL import Image

from mmadapt.data import DataError, load, write_digits_vqa
from mmadapt.data.digits_turned import KINDS, write_turned_digits


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits_vqa(
        tmp_path_factory.mktemp("digits") / "data", train=30, val=4, test=12, captions=4
    )


def test_questions_and_scans(digits, tmp_path):
    root = write_turned_digits(digits, tmp_path / "turned")
    upright = json.loads((digits / "problems.json").read_text())
    turned = json.loads((root / "problems.json").read_text())
    assert turned == {k: p for k, p in upright.items() if p["skill"] in KINDS}
    for split in ("train", "test"):
        before = {s.id: s for s in (load_split(digits, split))}
        after = load_split(root, split)
        assert after and {s.id for s in after} <= set(before)
        for sample in after:
            (a,), (b,) = sample.image_paths(), before[sample.id].image_paths()
            assert np.array_equal(np.array(Image.open(a)), np.array(Image.open(b))[::-1, ::-1])


def load_split(root, split):
    data = load({"reader": "scienceqa", "path": root, "split": split})
    return [data[i] for i in range(len(data))]


def test_a_set_of_the_same_source_is_kept_and_no_other(digits, tmp_path):
    root = write_turned_digits(digits, tmp_path / "turned")
    stamp = (root / "problems.json").stat().st_mtime_ns
    write_turned_digits(digits, root)
    assert (root / "problems.json").stat().st_mtime_ns == stamp
    other = write_digits_vqa(tmp_path / "other", seed=1, train=20, val=4, test=12, captions=4)
    with pytest.raises(DataError, match="was turned from a set with"):
        write_turned_digits(other, root)
