"""docs/crome.md shows what the committed record of the demo says, and the record says enough."""

import importlib.util
from pathlib import Path

from mmadapt.eval import RunResults

ROOT = Path(__file__).resolve().parents[1]


def test_numbers_are_those_of_the_record():
    spec = importlib.util.spec_from_file_location("update_crome", ROOT / "docs/update_crome.py")
    update = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(update)
    assert update.main(["--check"]) == 0


def test_the_record():
    """The new task was learnt, text alone is what it was to the last bit, swapping is lossless."""
    text = (ROOT / "docs/demo/crome_metrics.json").read_text(encoding="utf-8")
    results = RunResults.from_json(text)
    assert results.transfer.gain > 0.2
    assert results.forgetting.before == results.forgetting.after
    earlier = {name: pair[0] for name, pair in results.transfer.source.items()}
    assert results.transfer.restored == earlier
