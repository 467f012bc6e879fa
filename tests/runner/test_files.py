"""Files are whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner import files


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(b"old")
    with files.aside(path) as file:
        file.write(b"ne")
        assert path.read_bytes() == b"old"
        file.write(b"w")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    files.replace_file(path, b"old")
    with pytest.raises(RuntimeError), files.aside(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_sweep_removes_unfinished_files_alone(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    keep = [tmp_path / "metrics.csv", tmp_path / "checkpoints" / "last.pt", tmp_path / "notes.tmp"]
    left = [tmp_path / ".metrics.csv.12.tmp", tmp_path / "checkpoints" / ".last.pt.34.tmp"]
    for file in (*keep, *left):
        file.touch()
    files.sweep(tmp_path)
    assert {file for file in tmp_path.rglob("*") if file.is_file()} == set(keep)
