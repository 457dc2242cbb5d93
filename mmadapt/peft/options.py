"""Checks that the tuners' configurations share."""

import re


def check_pattern(name: str, pattern: str) -> None:
    """Raise ValueError unless `pattern` is a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name} is not a regular expression: {pattern!r} ({error})") from error
