"""A folder, a zip or a tar as named files that are read in memory; nothing is ever unpacked to the disk."""

from __future__ import annotations

import contextlib
import hashlib
import lzma
import os
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from experiments.data.image_folder.decoding import SUFFIXES, Content, Unreadable
from runner.errors import UserError

_MAX_BYTES = 256_000_000  # of one file: a small archive can hold more than the memory does
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError)


class Container(ABC):
    """Image files by their names, with / between folders, whatever the system."""

    def __init__(self, path: Path):
        self.path = path

    def names(self) -> list[str]:
        """Return the names of all files that may be images and are not hidden; raise UserError if unreadable."""
        with _reading(self.path):
            return self._names()

    def contents(self, names: Sequence[str]) -> Iterator[tuple[str, Content]]:
        """Yield each of these files with its content, in the given order, or in a tar's own.

        Raise UserError where the archive is so damaged that its files cannot be told apart.
        """
        with _reading(self.path):
            yield from self._contents(names)

    @abstractmethod
    def _names(self) -> list[str]:
        """Implement `names`; errors are handled there."""

    @abstractmethod
    def _contents(self, names: Sequence[str]) -> Iterator[tuple[str, Content]]:
        """Implement `contents`; errors are handled there."""

    def state(self) -> str:
        """Return a digest that changes when a file does: of sizes and times, which cost no reading."""
        status = self.path.stat()
        return hashlib.sha256(f"{status.st_size} {status.st_mtime_ns}".encode()).hexdigest()


class Folder(Container):
    """The files below a folder, links followed."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._files: dict[str, os.stat_result] = {}
        visited: set[tuple[int, int]] = set()
        errors: list[OSError] = []  # a folder that cannot be listed would else pass for an empty one
        for place, folders, files in os.walk(path, followlinks=True, onerror=errors.append):
            # a link to a folder above would never end
            status = Path(place).stat()
            if (status.st_dev, status.st_ino) in visited:
                folders.clear()
                continue
            visited.add((status.st_dev, status.st_ino))

            # its files
            folders[:] = sorted(folder for folder in folders if not _is_hidden(folder))
            for file in (Path(place, name) for name in files):
                name = file.relative_to(path).as_posix()
                with contextlib.suppress(OSError):  # a link to nowhere
                    if _may_be_image(name) and file.is_file():  # a pipe would keep its reader waiting
                        self._files[name] = file.stat()
        if errors:
            raise errors[0]

    def _names(self) -> list[str]:
        return list(self._files)

    def _contents(self, names: Sequence[str]) -> Iterator[tuple[str, Content]]:
        for name in names:
            try:
                with (self.path / name).open("rb") as file:
                    yield name, _read_limited(file)
            except OSError as error:
                yield name, Unreadable(error.strerror or str(error))

    def state(self) -> str:
        files = sorted(self._files.items())
        lines = (f"{status.st_size} {status.st_mtime_ns} {name}\n" for name, status in files)
        return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


class _Zip(Container):
    """The members of a zip."""

    def _names(self) -> list[str]:
        with zipfile.ZipFile(self.path) as archive:
            self._members = {
                _normalise(info.filename): info for info in archive.infolist() if not info.is_dir()
            }
        return [name for name in self._members if _may_be_image(name)]

    def _contents(self, names: Sequence[str]) -> Iterator[tuple[str, Content]]:
        with zipfile.ZipFile(self.path) as archive:
            for name in names:
                try:
                    with archive.open(self._members[name]) as file:
                        yield name, _read_limited(file)
                except (*_DAMAGE, RuntimeError) as error:  # encrypted, or an unknown compression
                    yield name, Unreadable(str(error))


class _Tar(Container):
    """The members of a tar, packed or not; it has no table of them, so it is read through each time."""

    def _names(self) -> list[str]:
        with tarfile.open(self.path) as archive:
            members = (_normalise(member.name) for member in archive if member.isreg())
            return list(dict.fromkeys(name for name in members if _may_be_image(name)))

    def _contents(self, names: Sequence[str]) -> Iterator[tuple[str, Content]]:
        selected = set(names)
        with tarfile.open(self.path) as archive:
            for member in archive:
                name = _normalise(member.name)
                if member.isreg() and name in selected:
                    file = archive.extractfile(member)
                    assert file is not None, "a regular file has content"
                    yield name, _read_limited(file)


def open_container(path: Path) -> Container:
    """Open the folder or archive at `path`; raise UserError where there is nothing, or something else."""
    problem = "expected a folder, a zip or a tar (.tar, .tar.gz, .tar.xz, .tar.bz2)"
    with _reading(path):
        if not path.exists():
            problem = "no such folder or file"
        elif path.is_dir():
            return Folder(path)
        elif zipfile.is_zipfile(path):
            return _Zip(path)
        elif tarfile.is_tarfile(path):
            return _Tar(path)
    raise UserError(f"data.root={path}: {problem}")


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what goes wrong with a folder or an archive as a whole into a UserError."""
    try:
        yield
    except _DAMAGE as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"data.root={path} cannot be read or is damaged: {reason}") from None


def _read_limited(file: IO[bytes]) -> Content:
    """Return the content of a file, if that is not too much."""
    content = file.read(_MAX_BYTES + 1)
    return content if len(content) <= _MAX_BYTES else Unreadable(f"more than {_MAX_BYTES:,} bytes")


def _normalise(name: str) -> str:
    """Drop from the name of an archive's member the parts without meaning, such as a leading ./"""
    return "/".join(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))


def _may_be_image(name: str) -> bool:
    """Decide by the suffix; exclude what is hidden and what macOS adds to archives."""
    return name.lower().endswith(SUFFIXES) and not any(map(_is_hidden, name.split("/")))


def _is_hidden(part: str) -> bool:
    return part.startswith(".") or part == "__MACOSX"
