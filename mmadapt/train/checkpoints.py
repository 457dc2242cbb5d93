"""Which checkpoints of a stage can be resumed.

`Trainer` writes `checkpoint-N` in place, so a process killed while saving leaves a folder that
looks like a checkpoint. Only folders that carry a marker, written last, count; the rest is
removed before the stage goes on.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmadapt.train.errors import RunError

MARKER = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Marker:
    """Written into a finished checkpoint. `last` says that no step is left to train."""

    step: int
    world_size: int
    last: bool


def write_text_atomic(path: Path, text: str) -> None:
    """Write a file that is either the old or the new one, whenever the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json_atomic(path: Path, value: Any) -> None:
    write_text_atomic(path, json.dumps(value, indent=2, sort_keys=False) + "\n")


def mark_complete(checkpoint: Path, marker: Marker) -> None:
    write_json_atomic(checkpoint / MARKER, asdict(marker))


def read_marker(checkpoint: Path) -> Marker | None:
    """The marker of a checkpoint; None when saving it never ended."""
    try:
        return Marker(**json.loads((checkpoint / MARKER).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def checkpoints(stage_dir: Path) -> list[Path]:
    """Checkpoint folders of a stage, complete or not, by step."""
    if not stage_dir.is_dir():
        return []
    found = [(m, p) for p in stage_dir.iterdir() if p.is_dir() and (m := _NAME.fullmatch(p.name))]
    return [path for match, path in sorted(found, key=lambda item: int(item[0][1]))]


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint; the marker goes first, so that a kill leaves an incomplete one."""
    (checkpoint / MARKER).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def prune(stage_dir: Path, keep: int | None) -> None:
    """Keep the newest `keep` complete checkpoints (None: all)."""
    complete = [path for path in checkpoints(stage_dir) if read_marker(path)]
    for path in complete[:-keep] if keep else []:
        remove(path)


def latest(stage_dir: Path, *, world_size: int) -> tuple[Path, Marker] | None:
    """Newest complete checkpoint with its marker; incomplete ones are ignored.

    Raises:
        RunError: the checkpoint was written by another number of processes. Their random states
            and data shards would not fit, so the run could not go on as if nothing happened.
    """
    for path in reversed(checkpoints(stage_dir)):
        marker = read_marker(path)
        if marker is None:
            continue
        if marker.world_size != world_size:
            raise RunError(
                f"{path} was written by {marker.world_size} processes, this run has {world_size}; "
                f"start it with {marker.world_size} or choose another `out`"
            )
        return path, marker
    return None


def remove_incomplete(stage_dir: Path) -> list[Path]:
    """Delete checkpoints whose saving never ended; returns what was deleted."""
    broken = [path for path in checkpoints(stage_dir) if read_marker(path) is None]
    for path in broken:
        remove(path)
    return broken
