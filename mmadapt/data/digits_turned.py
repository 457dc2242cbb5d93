"""A second task on the same scans: questions of digits-vqa with every scan turned upside down.

A 6 that stands on its head looks like a 9, so what was learnt about upright scans misleads; the
questions and their answers stay those of the upright scan. Layout and splits are digits-vqa's.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

from PIL import Image

from mmadapt.data.errors import DataError
from mmadapt.data.files import read_json

_MANIFEST = "digits_turned.json"
KINDS = ("which digit", "even or odd", "larger than")


def write_turned_digits(source: str | os.PathLike[str], root: str | os.PathLike[str]) -> Path:
    """Write the turned set of a digits-vqa folder to `root`; one of the same source is kept.

    It holds the questions about a single scan (`KINDS`), their images rotated by 180 degrees.
    """
    source, root = Path(source), Path(root)
    parameters = read_json(source / "digits_vqa.json", dict)
    if root.exists():
        found = read_json(root / _MANIFEST, dict)
        if found != parameters:
            raise DataError(f"{root}: was turned from a set with {found}, asked for {parameters}")
        return root
    problems = {
        pid: problem
        for pid, problem in read_json(source / "problems.json", dict).items()
        if problem["skill"] in KINDS
    }
    splits = read_json(source / "pid_splits.json", dict)
    root.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{root.name}.", dir=root.parent))
    try:
        scratch.chmod(0o755)
        for pid, problem in problems.items():
            folder = Path(problem["split"]) / pid
            (scratch / folder).mkdir(parents=True)
            with Image.open(source / folder / problem["image"]) as scan:
                turned = scan.transpose(Image.Transpose.ROTATE_180)
                turned.save(scratch / folder / problem["image"])
        kept = {name: [pid for pid in pids if pid in problems] for name, pids in splits.items()}
        for name, value in (
            ("problems.json", problems),
            ("pid_splits.json", kept),
            (_MANIFEST, parameters),
        ):
            (scratch / name).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        os.replace(scratch, root)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return root
