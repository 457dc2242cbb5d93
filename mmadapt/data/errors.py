"""The one error of this package: bad data on disk, named by file and record."""

from __future__ import annotations

from os import PathLike


class DataError(ValueError):
    """A data file, record or image that cannot be used; the message names file and record."""

    @classmethod
    def at(cls, file: str | PathLike[str], record: object, problem: str) -> DataError:
        """`file`, record `record`: what is wrong with it."""
        where = f"{file}" if record is None else f"{file}, record {record!r}"
        return cls(f"{where}: {problem}")
