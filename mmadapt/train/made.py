"""Folders that a recipe makes itself, once: with the settings they were made from beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmadapt.train.checkpoints import write_json_atomic
from mmadapt.train.errors import RunError

_MADE = "made.json"


def already_made(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder is there.

    Raises:
        RunError: it was made from other settings, or by no recipe.
    """
    if not folder.exists():
        return False
    try:
        found = json.loads((folder / _MADE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(
            f"model.name: {folder} exists and was not made by a recipe; set model.make=null to "
            "use it as it is"
        ) from None
    if found != settings:
        raise RunError(
            f"model.name: {folder} was made with {found}, the recipe asks for {settings}; name "
            "another folder or delete this one"
        )
    return True


@contextmanager
def making(folder: Path, settings: dict[str, Any]) -> Iterator[Path]:
    """A folder to fill, renamed to `folder` at the end; one left half full by a kill is dropped."""
    scratch = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    yield scratch
    write_json_atomic(scratch / _MADE, settings)
    scratch.replace(folder)
