"""Atomic writing: the old file or the new one, on the disk, with nothing beside it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runner import files


def test_a_path_is_the_old_one_until_the_new_one_is_whole(tmp_path: Path) -> None:
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
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_whole_or_absent(tmp_path: Path) -> None:
    with files.atomic_path(tmp_path / "images") as temporary:
        temporary.mkdir()
        (temporary / "0.png").touch()
    with pytest.raises(RuntimeError), files.atomic_path(tmp_path / "more") as temporary:
        temporary.mkdir()
        raise RuntimeError
    assert list(tmp_path.rglob("*")) == [tmp_path / "images", tmp_path / "images" / "0.png"]


@pytest.mark.parametrize("sync", [True, False])
def test_file_and_folder_are_flushed_around_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync: bool
) -> None:
    path, events, true_replace = tmp_path / "table.csv", [], Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(Path, "replace", lambda *paths: events.append("rename") or true_replace(*paths))
    with files.atomic_path(path, sync) as temporary:
        temporary.write_bytes(b"new")
    flushed = [path.stat().st_ino, "rename", tmp_path.stat().st_ino]
    assert events == (flushed if sync else ["rename"])


def test_only_unfinished_files_and_folders_are_removed(tmp_path: Path) -> None:
    keep = [tmp_path / "metrics.csv", tmp_path / "checkpoints" / "last.pt", tmp_path / "notes.tmp"]
    unfinished = [tmp_path / ".metrics.csv.12.tmp", tmp_path / "checkpoints" / ".last.pt.34.tmp"]
    unfinished.append(tmp_path / ".images.56.tmp" / "0.png")
    for file in (*keep, *unfinished):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    files.remove_unfinished(tmp_path)
    assert {path for path in tmp_path.rglob("*") if path.name != "checkpoints"} == set(keep)
