"""Only checkpoints that were saved to their end are resumed."""

import pytest

from mmadapt.train import RunError
from mmadapt.train.checkpoints import (
    Marker,
    latest,
    mark_complete,
    prune,
    read_marker,
    remove_incomplete,
    write_json_atomic,
)


def checkpoint(folder, step, *, complete=True, last=False):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "weights").write_text("w")
    if complete:
        mark_complete(path, Marker(step=step, world_size=1, last=last))
    return path


def test_the_newest_complete_one_counts(tmp_path):
    checkpoint(tmp_path, 9)
    newest = checkpoint(tmp_path, 10)
    broken = checkpoint(tmp_path, 11, complete=False)
    assert latest(tmp_path, world_size=1) == (newest, Marker(10, 1, False))
    assert remove_incomplete(tmp_path) == [broken]
    assert not broken.exists()
    assert newest.exists()


def test_no_checkpoint(tmp_path):
    assert latest(tmp_path / "absent", world_size=1) is None
    checkpoint(tmp_path, 1, complete=False)
    assert latest(tmp_path, world_size=1) is None


def test_pruning_counts_complete_ones(tmp_path):
    old, new = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    checkpoint(tmp_path, 3, complete=False)
    prune(tmp_path, 1)
    assert not old.exists()
    assert new.exists()
    prune(tmp_path, None)
    assert new.exists()


def test_other_process_count_is_refused(tmp_path):
    checkpoint(tmp_path, 1)
    with pytest.raises(RunError, match="written by 1 processes, this run has 2"):
        latest(tmp_path, world_size=2)


def test_foreign_folders_are_left_alone(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "runs").mkdir()
    assert remove_incomplete(tmp_path) == []
    assert (tmp_path / "checkpoint-best").exists()


def test_atomic_writing_keeps_the_old_file_on_failure(tmp_path):
    path = tmp_path / "file.json"
    write_json_atomic(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json_atomic(path, {"a": object()})
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_marker_round_trip(tmp_path):
    path = checkpoint(tmp_path, 5, last=True)
    assert read_marker(path) == Marker(step=5, world_size=1, last=True)
