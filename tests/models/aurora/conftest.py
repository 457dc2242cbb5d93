"""Tiny random BLIPs and batches, from `tiny.py` beside this file."""

import importlib.util
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("tiny_blip", Path(__file__).with_name("tiny.py"))
_tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_tiny)


@pytest.fixture
def tiny():
    return _tiny


@pytest.fixture
def tiny_vqa():
    return _tiny.make_vqa()
