"""Atomic writing: the old file or the new one, on the disk, with nothing beside it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runner import files


def test_a_path_is_the_old_one_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes(b"old")
    with files.atomic_path(path) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"

    with pytest.raises(RuntimeError), files.atomic_path(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"new"

    # a folder
    with files.atomic_path(tmp_path / "images") as temporary:
        temporary.mkdir()
        (temporary / "0.png").touch()
    with pytest.raises(RuntimeError), files.atomic_path(tmp_path / "more") as temporary:
        temporary.mkdir()
        raise RuntimeError
    assert {*tmp_path.rglob("*")} == {path, tmp_path / "images", tmp_path / "images" / "0.png"}


@pytest.mark.parametrize("sync", [True, False])
def test_file_and_folder_are_flushed_around_the_rename(tmp_path, monkeypatch, sync):
    path, events, true_replace = tmp_path / "table.csv", [], Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(Path, "replace", lambda *paths: events.append("rename") or true_replace(*paths))
    with files.atomic_path(path, sync) as temporary:
        temporary.write_bytes(b"new")
    flushed = [path.stat().st_ino, "rename", tmp_path.stat().st_ino]
    assert events == (flushed if sync else ["rename"])


def test_only_unfinished_files_and_folders_are_removed(tmp_path):
    keep = {"metrics.csv", "checkpoints/last.pt", "notes.tmp"}
    for name in {*keep, ".metrics.csv.12.tmp", "checkpoints/.last.pt.34.tmp", ".images.56.tmp/0.png"}:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    files.remove_unfinished(tmp_path)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {*keep, "checkpoints"}
