"""Writes digit scenes to disk in the layouts of COCO captions and VQAv2.

    captions_train.json  captions_test.json     as coco_karpathy_*.json
    vqa_train.json  vqa_test.json  answer_list.json     as VQAv2's (the test file keeps answers)
    images/<split>/<number>.png
    digit_scenes.json                           parameters; present only in a complete set

Test scenes are drawn from scans that no training scene uses, and no two of them show the same
digits in the same order, so a caption has one image.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from PIL import Image

from mmadapt.data.digit_scenes import (
    ANSWERS,
    QUESTIONS,
    TARGET_COUNTS,
    Scene,
    draw_scene,
    target_captions,
)
from mmadapt.data.errors import DataError
from mmadapt.data.scene_images import SCENE_SIZE, SceneArtist

_MANIFEST = "digit_scenes.json"
_VERSION = 1
_MOST = 10**2 + 10**3  # ordered pairs and triples


def write_digit_scenes(
    root: str | os.PathLike[str],
    *,
    seed: int = 0,
    train: int = 2000,
    test: int = 200,
    questions: int = 3,
) -> Path:
    """Write the target set to `root`; reuse a set of the same parameters.

    `train` and `test` count images, `questions` those asked of each. The same arguments give the
    same bytes. A killed run leaves no half set under that name.

    Raises:
        ValueError: a count below 1, or more test images than there are scenes.
        DataError: `root` holds something else.
    """
    root = Path(root)
    parameters = {
        "version": _VERSION,
        "image_size": SCENE_SIZE,
        "seed": seed,
        "train": train,
        "test": test,
        "questions": questions,
    }
    for name in ("train", "test", "questions"):
        if parameters[name] < 1:
            raise ValueError(f"{name}: expected at least 1, got {parameters[name]}")
    if test > _MOST:
        raise ValueError(f"test: there are {_MOST} scenes of different digits, got {test}")
    if root.exists():
        _check(root, parameters)
        return root
    scratch = root.with_name(f".{root.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    _write_split(scratch, "train", _train_digits(train, seed), questions, seed)
    _write_split(scratch, "test", _test_digits(test, seed), questions, seed)
    _dump(scratch / "answer_list.json", list(ANSWERS))
    _dump(scratch / _MANIFEST, parameters)
    scratch.replace(root)
    return root


def _check(root: Path, parameters: dict[str, int]) -> None:
    try:
        found = json.loads((root / _MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{root}: exists and is no set of digit scenes ({error})") from error
    if found != parameters:
        raise DataError(
            f"{root}: was written with {found}, asked for {parameters}; choose another folder"
        )


def _train_digits(count: int, seed: int) -> list[tuple[int, ...]]:
    rng = random.Random(f"digit-scenes/{seed}/train")
    sizes = [rng.choice(TARGET_COUNTS) for _ in range(count)]
    return [tuple(rng.randrange(10) for _ in range(size)) for size in sizes]


def _test_digits(count: int, seed: int) -> list[tuple[int, ...]]:
    """Different scenes; as many pairs as triples, while there are pairs."""
    rng = random.Random(f"digit-scenes/{seed}/test")
    pairs, triples = (list(product(range(10), repeat=n)) for n in TARGET_COUNTS)
    chosen = rng.sample(pairs, min(count // 2, len(pairs)))
    chosen += rng.sample(triples, count - len(chosen))
    rng.shuffle(chosen)
    return chosen


def _write_split(
    root: Path, split: str, scenes: Sequence[tuple[int, ...]], questions: int, seed: int
) -> None:
    rng = random.Random(f"digit-scenes/{seed}/{split}/drawing")
    artist = SceneArtist(split)
    captions, asked = [], []
    (root / "images" / split).mkdir(parents=True)
    for number, digits in enumerate(scenes):
        scene = draw_scene(digits, rng)
        name = f"images/{split}/{number:05d}.png"
        Image.fromarray(artist.draw(scene, rng)).save(root / name)
        texts = target_captions(scene)
        if split == "train":
            # two images of the same digits are no negatives of each other
            shown = "-".join(map(str, digits))
            captions += [{"image": name, "caption": t, "image_id": shown} for t in texts]
        else:
            captions.append({"image": name, "caption": texts})
        asked += _ask(scene, name, number, questions, rng)
    _dump(root / f"captions_{split}.json", captions)
    _dump(root / f"vqa_{split}.json", asked)


def _ask(
    scene: Scene, image: str, number: int, count: int, rng: random.Random
) -> list[dict[str, object]]:
    records = []
    kinds = rng.sample(list(QUESTIONS), min(count, len(QUESTIONS)))
    for place, kind in enumerate(kinds):
        question, answer = QUESTIONS[kind](scene, rng)
        records.append(
            {
                "question": question,
                "answer": [answer],
                "image": image,
                "dataset": "vqa",
                "question_id": number * len(QUESTIONS) + place,
                "kind": kind,
            }
        )
    return records


def _dump(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=0) + "\n")
