"""Digit scenes: what is said about them is true, splits do not mix, files are as readers want."""

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmadapt.data import DataError, load, write_digit_scenes
from mmadapt.data.digit_questions import WORDS
from mmadapt.data.digit_scenes import (
    ANSWERS,
    CELLS,
    COUNTS,
    QUESTIONS,
    Scene,
    draw_scene,
    source_captions,
    target_captions,
    vocabulary,
)
from mmadapt.data.scene_images import CELL_SIZE, SCENE_SIZE, SceneArtist

SCENE = Scene(((0, 7), (3, 2)))


def test_captions():
    assert target_captions(SCENE) == ["a seven and a two", "seven then two", "it reads seven two"]
    assert source_captions(SCENE) == [
        "it reads seven two",
        "scans of seven and two",
        "a seven at the top left, a two at the bottom right",
        "seven then two",
    ]
    three = Scene(((0, 7), (1, 0), (3, 2)))
    assert target_captions(three)[0] == "a seven, a zero and a two"


digits_of_scenes = st.lists(st.integers(0, 9), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(digits_of_scenes, st.integers(0, 2**16), st.sampled_from(list(QUESTIONS)))
def test_answers_are_true_and_among_the_candidates(digits, seed, kind):
    rng = random.Random(seed)
    scene = draw_scene(digits, rng)
    assert scene.digits == tuple(digits)
    question, answer = QUESTIONS[kind](scene, rng)
    assert answer in (*ANSWERS, "four")
    known = {cell: WORDS[digit] for cell, digit in scene.cells}
    if kind == "cell":
        (cell,) = [i for i, name in enumerate(CELLS) if name in question]
        assert answer == known.get(cell, "nothing")
    elif kind == "count":
        assert answer == COUNTS[len(digits)]
    elif kind == "presence":
        (word,) = [w for w in WORDS if f" {w}?" in question]
        assert (answer == "yes") == (WORDS.index(word) in digits)
    elif kind == "order":
        assert answer == WORDS[digits[0 if "first" in question else -1]]
    else:
        assert answer == WORDS[(max if "largest" in question else min)(digits)]


def test_every_word_is_in_the_vocabulary():
    words = set(vocabulary())
    rng = random.Random(5)
    for _ in range(100):
        scene = draw_scene([rng.randrange(10) for _ in range(rng.randint(1, 3))], rng)
        texts = source_captions(scene) + target_captions(scene) + list(ANSWERS)
        texts += [ask(scene, rng)[0] for ask in QUESTIONS.values()]
        spaced = " ".join(texts).replace(",", " , ").replace("?", " ? ")
        assert set(spaced.split()) <= words


def test_scans_stand_in_their_cells():
    canvas = SceneArtist("train").draw(SCENE, random.Random(0))
    assert canvas.shape == (SCENE_SIZE, SCENE_SIZE)
    cells = canvas.reshape(2, CELL_SIZE, 2, CELL_SIZE).max((1, 3)).flatten()
    assert [bool(value) for value in cells] == [True, False, False, True]
    with pytest.raises(ValueError, match="split: expected one of"):
        SceneArtist("all")


def test_training_and_test_scans_differ():
    train, test = (SceneArtist(split)._scans for split in ("train", "test"))
    for digit in range(10):
        seen = {scan.tobytes() for scan in train[digit]}
        shared = [scan for scan in test[digit] if scan.tobytes() in seen]
        assert len(shared) <= 1  # scikit-learn's scans repeat hardly ever
        assert len(test[digit]) > 20 and np.asarray(test[digit]).std() > 0


def test_files(tmp_path):
    root = write_digit_scenes(tmp_path / "a", train=6, test=10, questions=2)
    train = load({"reader": "coco_karpathy", "path": root / "captions_train.json"})
    test = load({"reader": "coco_karpathy", "path": root / "captions_test.json"})
    assert (len(train), len(test)) == (18, 10)
    assert len(set(test.texts)) == len(test.texts) == 30  # a caption has one image
    assert test.text_image == [i // 3 for i in range(30)]
    assert train.validate() == test.validate() == []
    asked = load({"reader": "vqav2", "path": root / "vqa_test.json"})
    assert len(asked) == 20 and all(len(sample.answers) == 1 for sample in asked)
    assert len({sample.question_id for sample in asked}) == 20
    candidates = json.loads((root / "answer_list.json").read_text())
    assert {sample.answers[0] for sample in asked} <= set(candidates)


def test_images_of_the_same_digits_share_an_id(tmp_path):
    root = write_digit_scenes(tmp_path / "a", train=300, test=1)
    records = json.loads((root / "captions_train.json").read_text())
    numbers = {}
    for record in records:
        if record["caption"].startswith("it reads"):
            numbers.setdefault(record["caption"], set()).add(record["image_id"])
    assert all(len(ids) == 1 for ids in numbers.values())
    assert len(numbers) < 300


def test_same_arguments_same_bytes_and_reuse(tmp_path):
    one = write_digit_scenes(tmp_path / "a", train=3, test=3)
    other = write_digit_scenes(tmp_path / "b", train=3, test=3)
    for file in sorted(p for p in one.rglob("*") if p.is_file()):
        assert file.read_bytes() == (other / file.relative_to(one)).read_bytes()
    assert write_digit_scenes(one, train=3, test=3) == one
    with pytest.raises(DataError, match="choose another folder"):
        write_digit_scenes(one, train=4, test=3)
    (tmp_path / "c").mkdir()
    with pytest.raises(DataError, match="is no set of digit scenes"):
        write_digit_scenes(tmp_path / "c")
    with pytest.raises(ValueError, match="test: there are 1100 scenes"):
        write_digit_scenes(tmp_path / "d", test=2000)
