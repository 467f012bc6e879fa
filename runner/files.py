"""Atomic writing of files and folders: the old one or the new one, never half of one."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from runner.errors import UserError

__all__ = ["atomic_path", "csv_bytes", "read_json", "remove_unfinished", "replace_file"]

_UNFINISHED = ".tmp"  # ends the name of what is being written


@contextlib.contextmanager
def atomic_path(path: Path, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`, then flush what was written there and rename it to `path`.

    The folder of `path` is made where there is none.
    A kill at any instant leaves the old file or folder, or the new one. `sync=False` does not wait for the
    disk: a power cut may then lose the file, a kill still cannot.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_UNFINISHED}")
    try:
        yield temporary
        if sync:
            _fsync(temporary)
        temporary.replace(path)
        # the rename itself is an entry of the folder
        if sync:
            _fsync(path.parent)
    finally:
        _remove(temporary)


def replace_file(path: Path, data: bytes) -> None:
    """Write a file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def csv_bytes(rows: Iterable[Iterable[Any]]) -> bytes:
    """Return the content of a CSV file with these rows."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def remove_unfinished(folder: Path) -> None:
    """Remove what killed writers left unfinished below a folder."""
    for unfinished in list(folder.rglob(f".*{_UNFINISHED}")):
        _remove(unfinished)


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the mapping in a JSON file, or None if there is no such file.

    Raises:
        UserError: it is damaged.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return content


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
