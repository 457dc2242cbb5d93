"""The tables of docs/aurora_training.md are those of the committed runs."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_tables_come_from_the_records(capsys):
    spec = importlib.util.spec_from_file_location("update_aurora", ROOT / "docs/update_aurora.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main(["--check"]) == 0, capsys.readouterr().out
