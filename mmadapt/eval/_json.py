"""Dataclasses to strict JSON and back, by their type hints.

Written here because pydantic is an optional dependency and metrics must be readable without it.
Supports what `results.py` uses: dataclasses, lists, tuples, string-keyed dicts, optionals,
str, int, float, bool and Any.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from typing import Any, TypeVar

T = TypeVar("T")


def dumps(value: Any, *, indent: int | None) -> str:
    return json.dumps(_encode(value), indent=indent, allow_nan=False, ensure_ascii=False)


def loads(kind: type[T], text: str) -> T:
    return _decode(kind, json.loads(text), kind.__name__)


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no nan or inf; a diverged run must still be reportable
    return value


def _decode(kind: Any, value: Any, path: str) -> Any:
    if kind is Any:
        return value
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, path)
    if origin in (types.UnionType, typing.Union):  # only X | None occurs
        inner = next(arg for arg in args if arg is not type(None))
        return None if value is None else _decode(inner, value, path)
    if origin is list:
        _expect(value, list, path)
        return [_decode(args[0], item, f"{path}[{i}]") for i, item in enumerate(value)]
    if origin is tuple:
        _expect(value, list, path)
        if len(value) != len(args):
            raise ValueError(f"{path}: got {len(value)} items, expected {len(args)}")
        pairs = enumerate(zip(args, value, strict=True))
        return tuple(_decode(arg, item, f"{path}[{i}]") for i, (arg, item) in pairs)
    if origin is dict:
        _expect(value, dict, path)
        return {key: _decode(args[1], item, f"{path}.{key}") for key, item in value.items()}
    if kind is float:
        return _decode_float(value, path)
    _expect(value, kind, path)
    return value


def _decode_dataclass(kind: Any, value: Any, path: str) -> Any:
    _expect(value, dict, path)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(value) - set(fields))
    if unknown:
        raise ValueError(f"{path}: got unknown keys {unknown}, expected {sorted(fields)}")
    required = {
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - set(value))
    if missing:
        raise ValueError(f"{path}: missing keys {missing}")
    hints = typing.get_type_hints(kind)
    return kind(**{name: _decode(hints[name], value[name], f"{path}.{name}") for name in value})


def _decode_float(value: Any, path: str) -> float:
    if value in ("nan", "inf", "-inf"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{path}: got {value!r}, expected a number")
    return value


def _expect(value: Any, kind: type, path: str) -> None:
    wrong_bool = kind is int and isinstance(value, bool)
    if wrong_bool or not isinstance(value, kind):
        raise ValueError(f"{path}: got {value!r}, expected {kind.__name__}")
