"""Reading from a data folder that is not trusted: JSON files and image paths."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any

from mmadapt.data.errors import DataError


def read_json(file: str | PathLike[str], expected: type) -> Any:
    """The parsed file, whose top level must be an `expected` (dict or list)."""
    try:
        with open(file, encoding="utf-8") as stream:
            value = json.load(stream)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # JSONDecodeError (names line and column) or bad UTF-8
        raise DataError(f"{file}: broken JSON ({error})") from error
    if not isinstance(value, expected):
        raise DataError(
            f"{file}: expected a JSON {expected.__name__} at the top level, "
            f"got {type(value).__name__}"
        )
    return value


class ImageFolder:
    """Image paths below one folder.

    `path(...)` refuses absolute paths, `..`, and symbolic links that lead out of the folder;
    `allow_links=True` accepts the links (a shared `coco/` linked into place).
    """

    def __init__(self, root: str | PathLike[str], *, allow_links: bool = False):
        self.root = Path(root)
        self.allow_links = allow_links
        self._real_root = self.root.resolve()

    def path(self, relative: Any, *, file: str | PathLike[str], record: object) -> str:
        """The path of an existing file; `file` and `record` name the source in errors."""
        if not isinstance(relative, str) or not relative or "\0" in relative:
            raise DataError.at(file, record, f"expected an image path, got {relative!r}")
        pure = PurePosixPath(relative)
        if pure.is_absolute() or ".." in pure.parts:
            raise DataError.at(file, record, f"image path {relative!r} leaves the data folder")
        full = self.root / pure
        if not full.is_file():
            raise DataError.at(file, record, f"image {full} is missing")
        if not self.allow_links and not full.resolve().is_relative_to(self._real_root):
            raise DataError.at(
                file,
                record,
                f"image path {relative!r} leaves the data folder through a symbolic link "
                "(allow_links=True accepts it)",
            )
        return str(full)
