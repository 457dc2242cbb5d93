import hashlib
import io
import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from PIL import Image

from mmadapt.data import DataError, LlavaJson, ScienceQA, write_digits_vqa
from mmadapt.data import digits_vqa as module
from mmadapt.data.digits_vqa import IMAGE_SIZE, KINDS, SCAN_BLOCKS, VISUAL_KINDS

SIZES = {"train": 600, "val": 90, "test": 150, "captions": 120}
SCIENCEQA_FIELDS = [
    "question",
    "choices",
    "answer",
    "hint",
    "image",
    "task",
    "grade",
    "subject",
    "topic",
    "category",
    "skill",
    "lecture",
    "solution",
    "split",
]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_digits_vqa(tmp_path_factory.mktemp("data") / "digits", **SIZES)


@pytest.fixture(scope="module")
def problems(root) -> dict:
    return json.loads((root / "problems.json").read_text())


def tree(root: Path) -> dict[str, str]:
    return {
        str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(root.rglob("*"))
        if file.is_file()
    }


def test_layout_is_scienceqas(root, problems):
    splits = json.loads((root / "pid_splits.json").read_text())
    assert set(splits) == {
        "train", "val", "test", "trainval", "minitrain", "minival", "minitest"
    }  # fmt: skip
    assert {s: len(splits[s]) for s in ("train", "val", "test")} == {
        s: SIZES[s] for s in ("train", "val", "test")
    }
    assert splits["trainval"] == splits["train"] + splits["val"]
    assert splits["minitest"] == splits["test"][:15]
    assert sorted(problems) == sorted(splits["trainval"] + splits["test"])
    for pid, problem in problems.items():
        assert pid.isdecimal()
        assert pid in splits[problem["split"]]
        assert [key for key in problem if key != "images"] == SCIENCEQA_FIELDS
        scans = KINDS[problem["skill"]].num_scans
        folder = root / problem["split"] / pid
        assert problem["image"] == ("image.png" if scans else None)
        assert problem.get("images") == (["image.png", "image_2.png"] if scans == 2 else None)
        found = sorted(file.name for file in folder.iterdir()) if folder.exists() else []
        assert found == ["image.png", "image_2.png"][:scans]


def test_no_scan_is_in_two_splits(root, problems):
    blocks = [set(block) for block in SCAN_BLOCKS.values()]
    assert set().union(*blocks) == set(range(1797))
    assert sum(map(len, blocks)) == 1797
    seen = defaultdict(set)
    for pid, problem in problems.items():
        for name in problem.get("images", [problem["image"]]):
            if name:
                seen[problem["split"]].add((root / problem["split"] / pid / name).read_bytes())
    for file in (root / "captions" / "images").iterdir():
        seen["train"].add(file.read_bytes())
    assert all(len(scans) > 80 for scans in seen.values())
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["val"]
    assert not seen["val"] & seen["test"]


def test_images_show_the_digit_the_solution_names(root, problems):
    labels, scans = module._load_scans()
    label_of = dict(zip(scans, labels, strict=True))
    assert len(label_of) == 1797
    checked = 0
    for pid, problem in problems.items():
        if problem["image"] is None:
            continue
        names = problem.get("images", [problem["image"]])
        shown = [label_of[(root / problem["split"] / pid / n).read_bytes()] for n in names]
        start = f"The scan shows {shown[0]}."
        if len(shown) == 2:
            start = f"The scans show {shown[0]} and {shown[1]}."
        assert problem["solution"].startswith(start)
        checked += 1
    assert checked > 500


def test_scans_are_rgb_and_upright():
    labels, scans = module._load_scans()
    image = Image.open(io.BytesIO(scans[0]))
    assert (labels[0], image.mode, image.size) == (0, "RGB", (IMAGE_SIZE, IMAGE_SIZE))
    middle = IMAGE_SIZE // 2
    # Scan 0 is a zero: ink left and right of an empty middle, light ink on dark ground.
    row = [image.getpixel((x, middle))[0] for x in range(IMAGE_SIZE)]
    assert row[middle] < 40 < 120 < min(max(row[:middle]), max(row[middle:]))


def test_letters_are_balanced_within_each_kind(problems):
    counts = defaultdict(Counter)
    for problem in problems.values():
        counts[problem["split"], problem["skill"]][problem["answer"]] += 1
    assert len(counts) == 3 * len(KINDS)
    for letters in counts.values():
        assert max(letters.values()) - min(letters.values()) <= 1


def test_kinds_have_their_shares_in_every_split(problems):
    for split in ("train", "val", "test"):
        skills = Counter(p["skill"] for p in problems.values() if p["split"] == split)
        visual = sum(skills[kind] for kind in VISUAL_KINDS) / skills.total()
        assert visual == pytest.approx(11 / 15, abs=0.02)
        assert skills["which digit"] / skills.total() == pytest.approx(3 / 15, abs=0.02)


def test_readers_take_it(root):
    data = ScienceQA(root, "test")
    assert len(data) == SIZES["test"]
    assert data.validate() == []
    captions = LlavaJson(root / "captions" / "chat.json")
    assert len(captions) == SIZES["captions"]
    assert captions.validate() == []
    images = Counter(len(list(captions[i].image_paths())) for i in range(len(captions)))
    assert images == {1: 60, 2: 60}


def test_captions_name_training_scans(root):
    labels, scans = module._load_scans()
    index_of = {scan: index for index, scan in enumerate(scans)}
    records = json.loads((root / "captions" / "chat.json").read_text())
    for record in records:
        assert list(record) == ["id", "image", "conversations"]
        files = record["image"] if isinstance(record["image"], list) else [record["image"]]
        indices = [index_of[(root / "captions" / "images" / f).read_bytes()] for f in files]
        assert all(index in SCAN_BLOCKS["train"] for index in indices)
        human, gpt = record["conversations"]
        assert human["value"].count("<image>") == len(files)
        assert gpt == {
            "from": "gpt",
            "value": module.describe([labels[index] for index in indices]),
        }


def test_same_arguments_same_bytes(root, tmp_path):
    again = write_digits_vqa(tmp_path / "again", **SIZES)
    assert tree(again) == tree(root)
    other = write_digits_vqa(tmp_path / "other", seed=1, **SIZES)
    assert tree(other)["problems.json"] != tree(root)["problems.json"]


SMALL = {"train": 20, "val": 5, "test": 5, "captions": 4}


def test_a_complete_set_is_reused_and_another_one_refused(tmp_path):
    root = write_digits_vqa(tmp_path / "d", **SMALL)
    stamp = (root / "problems.json").stat().st_mtime_ns
    assert write_digits_vqa(str(root), **SMALL) == root
    assert (root / "problems.json").stat().st_mtime_ns == stamp
    with pytest.raises(DataError, match=r"'seed': 0.*asked for.*'seed': 9.*rewrite=True"):
        write_digits_vqa(root, seed=9, **SMALL)
    write_digits_vqa(root, seed=9, rewrite=True, **SMALL)
    assert json.loads((root / "digits_vqa.json").read_text())["seed"] == 9
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize("rewrite", [False, True])
def test_foreign_folders_are_left_alone(tmp_path, rewrite):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="exists and is not a digits-vqa set"):
        write_digits_vqa(tmp_path / "mine", rewrite=rewrite, **SMALL)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_an_interrupted_write_leaves_nothing_under_the_name(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_write_captions", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_digits_vqa(tmp_path / "d", **SMALL)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "d").mkdir()  # an empty folder is as good as none
    assert ScienceQA(write_digits_vqa(tmp_path / "d", **SMALL), "test").validate() == []


def test_a_second_process_that_comes_late_takes_the_first_ones_set(tmp_path, monkeypatch):
    write = module._write

    def overtaken(scratch, parameters):
        monkeypatch.setattr(module, "_write", write)
        write_digits_vqa(tmp_path / "d", **SMALL)
        write(scratch, parameters)

    monkeypatch.setattr(module, "_write", overtaken)
    assert write_digits_vqa(tmp_path / "d", **SMALL) == tmp_path / "d"
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize("name", SMALL)
def test_sizes_must_be_positive(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        write_digits_vqa(tmp_path / "d", **(SMALL | {name: 0}))
