"""digits-vqa: questions about scikit-learn's 1,797 handwritten digit scans, as ScienceQA on disk.

The scans are the test half of UCI's "Optical Recognition of Handwritten Digits" (8x8 pixels,
16 grey levels), which ships inside scikit-learn. Layout of the written folder:

    problems.json  pid_splits.json          as ScienceQA releases them
    <split>/<id>/image.png [image_2.png]    the scans of a problem
    captions/chat.json  captions/images/    captions of training scans, as LLaVA's CC3M-595K
    digits_vqa.json                         parameters; present only in a complete set

Splits are blocks of neighbouring scan indices, because neighbouring scans share a writer; no
scan is in two splits. A problem with two scans keeps the released `image: "image.png"` and names
both in one more key, `images`.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmadapt.data.digit_questions import (
    KINDS,
    TEXT_KINDS,
    VISUAL_KINDS,
    WORDS,
    Problem,
    describe,
    draw_digits,
    make_question,
    num_choices,
)
from mmadapt.data.errors import DataError

__all__ = [
    "CAPTION_REQUEST",
    "IMAGE_SIZE",
    "KINDS",
    "SCAN_BLOCKS",
    "TEXT_KINDS",
    "VISUAL_KINDS",
    "WORDS",
    "describe",
    "draw_digits",
    "make_question",
    "num_choices",
    "write_digits_vqa",
]

IMAGE_SIZE = 32
SCAN_BLOCKS = {"train": range(1200), "val": range(1200, 1438), "test": range(1438, 1797)}
CAPTION_REQUEST = {1: "<image>\nDescribe the image.", 2: "<image>\n<image>\nDescribe the images."}

_MANIFEST = "digits_vqa.json"
_VERSION = 1
# Questions per round: reading a scan is what is taught, so it gets the largest share.
_WEIGHTS = {kind: (3 if kind == "which digit" else 2) for kind in VISUAL_KINDS} | dict.fromkeys(
    TEXT_KINDS, 1
)


def write_digits_vqa(
    root: str | os.PathLike[str],
    *,
    seed: int = 0,
    train: int = 4000,
    val: int = 400,
    test: int = 800,
    captions: int = 2400,
    rewrite: bool = False,
) -> Path:
    """Write the set to `root` and return it as a Path; reuse a set of the same parameters.

    `train`, `val`, `test` count questions, `captions` counts caption records (half of them
    about two scans). The same arguments give the same bytes. The set is written beside `root`
    and renamed into place, so a killed run leaves no half set under that name.

    Raises DataError when `root` holds a set of other parameters (unless `rewrite`) or
    something that is not such a set (never overwritten).
    """
    root = Path(root)
    parameters = {
        "version": _VERSION,
        "image_size": IMAGE_SIZE,
        "seed": seed,
        "train": train,
        "val": val,
        "test": test,
        "captions": captions,
    }
    for name in ("train", "val", "test", "captions"):
        if parameters[name] < 1:
            raise ValueError(f"{name}: expected at least 1, got {parameters[name]}")
    if _reusable(root, parameters, rewrite):
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{root.name}.", dir=root.parent))
    try:
        scratch.chmod(0o755)
        _write(scratch, parameters)
        _move_into_place(scratch, root, parameters, rewrite)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return root


def _reusable(root: Path, parameters: dict[str, int], rewrite: bool) -> bool:
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    manifest = root / _MANIFEST
    try:
        found = json.loads(manifest.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{root}: exists and is not a digits-vqa set ({error})") from error
    if found == parameters:
        return True
    if rewrite:
        return False
    raise DataError(
        f"{manifest}: the set was written with {found}, asked for {parameters}; "
        "choose another folder or pass rewrite=True"
    )


def _move_into_place(scratch: Path, root: Path, parameters: dict[str, int], rewrite: bool) -> None:
    if rewrite and root.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{root.name}.old.", dir=root.parent))
        os.replace(root, old)
        os.replace(scratch, root)
        shutil.rmtree(old)
        return
    try:
        os.replace(scratch, root)
    except OSError:
        # Another process (a second rank) finished first: its set must be the same one.
        if not _reusable(root, parameters, rewrite=False):
            raise


def _write(root: Path, parameters: dict[str, int]) -> None:
    labels, scans = _load_scans()
    problems: dict[str, Problem] = {}
    splits: dict[str, list[str]] = {}
    for split, block in SCAN_BLOCKS.items():
        rng = random.Random(f"digits-vqa/{parameters['seed']}/{split}")
        splits[split] = []
        for problem, indices in _problems(parameters[split], labels, block, rng):
            pid = str(len(problems) + 1)
            names = ["image.png", "image_2.png"][: len(indices)]
            problem["split"] = split
            if names:
                problem["image"] = names[0]
                folder = root / split / pid
                folder.mkdir(parents=True)
                for name, index in zip(names, indices, strict=True):
                    (folder / name).write_bytes(scans[index])
            if len(names) > 1:
                problem["images"] = names
            problems[pid] = problem
            splits[split].append(pid)
    for split in SCAN_BLOCKS:
        splits[f"mini{split}"] = splits[split][: max(1, len(splits[split]) // 10)]
    splits["trainval"] = splits["train"] + splits["val"]
    _dump(root / "problems.json", problems)
    _dump(root / "pid_splits.json", splits)
    rng = random.Random(f"digits-vqa/{parameters['seed']}/captions")
    _write_captions(root / "captions", parameters["captions"], labels, scans, rng)
    _dump(root / _MANIFEST, parameters)


def _problems(
    count: int, labels: Sequence[int], block: range, rng: random.Random
) -> Iterator[tuple[Problem, tuple[int, ...]]]:
    """`count` problems in random order with the scan indices each one shows."""
    rounds = [kind for kind, weight in _WEIGHTS.items() for _ in range(weight)]
    kinds = [rounds[i % len(rounds)] for i in range(count)]
    rng.shuffle(kinds)
    decks = {kind: _deal(range(num_choices(kind)), rng) for kind in KINDS}
    scans = _deal(block, rng)
    for kind in kinds:
        if kind in TEXT_KINDS:
            indices, digits = (), draw_digits(kind, rng)
        else:
            indices = tuple(next(scans) for _ in range(KINDS[kind].num_scans))
            while kind == "two-scan comparison" and len({labels[i] for i in indices}) == 1:
                indices = (indices[0], next(scans))
            digits = tuple(labels[i] for i in indices)
        yield make_question(kind, digits, rng, position=next(decks[kind])), indices


def _deal(cards: Sequence[int], rng: random.Random) -> Iterator[int]:
    """All cards in random order, again and again: even use, so letters and scans balance."""
    while True:
        yield from rng.sample(cards, len(cards))


def _write_captions(
    root: Path, count: int, labels: Sequence[int], scans: Sequence[bytes], rng: random.Random
) -> None:
    (root / "images").mkdir(parents=True)
    deck = _deal(SCAN_BLOCKS["train"], rng)
    records = []
    for number in range(count):
        indices = [next(deck) for _ in range(1 + number % 2)]
        name = f"digits_{number:06d}"
        files = [f"{name}.png", f"{name}_2.png"][: len(indices)]
        for file, index in zip(files, indices, strict=True):
            (root / "images" / file).write_bytes(scans[index])
        caption = describe([labels[i] for i in indices])
        records.append(
            {
                "id": name,
                "image": files[0] if len(files) == 1 else files,
                "conversations": [
                    {"from": "human", "value": CAPTION_REQUEST[len(indices)]},
                    {"from": "gpt", "value": caption},
                ],
            }
        )
    rng.shuffle(records)
    _dump(root / "chat.json", records)


def _load_scans() -> tuple[list[int], list[bytes]]:
    """Labels and PNG bytes (RGB, IMAGE_SIZE square) of the 1,797 scans in scikit-learn's order."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("digits-vqa reads its scans from scikit-learn, not installed") from error
    from PIL import Image

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype("uint8")
    encoded = []
    for scan in pixels:
        image = Image.fromarray(scan).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format="PNG")
        encoded.append(buffer.getvalue())
    return [int(label) for label in digits.target], encoded


def _dump(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=1) + "\n")
