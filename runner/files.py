"""Files that are whole or not there: written aside, flushed to the disk, renamed."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

UNFINISHED = ".tmp"  # ends the name of a file that is being written


@contextlib.contextmanager
def aside(path: Path) -> Iterator[BinaryIO]:
    """A file to write that becomes `path` when it is whole: a kill at any instant leaves the old one or the new."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def replace_file(path: Path, data: bytes) -> None:
    """Write a whole file or none of it."""
    with aside(path) as file:
        file.write(data)


def read_json(path: Path) -> dict[str, Any] | None:
    """The mapping that a JSON file holds; None where there is no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    assert isinstance(found, dict), f"{path} holds no mapping"
    return found


def sweep(folder: Path) -> None:
    """Remove what writers that were killed left unfinished below a folder."""
    for unfinished in folder.rglob(f".*{UNFINISHED}"):
        unfinished.unlink(missing_ok=True)
