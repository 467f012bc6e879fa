"""A folder, a zip or a tar as named files that are read in memory; nothing is ever unpacked to the disk."""

from __future__ import annotations

import contextlib
import hashlib
import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from experiments.data.image_folder.decoding import SUFFIXES, Content, Unreadable
from runner.errors import UserError

MAX_BYTES = 256_000_000  # of one file: a small archive can hold more than the memory does
DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError)


class Container(ABC):
    """Image files by their names, with / between folders, whatever the system."""

    def __init__(self, path: Path):
        self.path = path

    def listed(self) -> list[str]:
        """The names of all files that may be images, hidden files and folders apart.

        Raises:
            UserError: the folder or the archive cannot be read.
        """
        with readable(self.path):
            return self.names()

    def contents(self, wanted: Sequence[str]) -> Iterator[tuple[str, Content]]:
        """The content of each of these files, in the given order, or a tar's own.

        Raises:
            UserError: the archive is damaged where files cannot be told from one another any more.
        """
        with readable(self.path):
            yield from self.read(wanted)

    @abstractmethod
    def names(self) -> list[str]:
        """`listed`, without a word for what goes wrong."""

    @abstractmethod
    def read(self, wanted: Sequence[str]) -> Iterator[tuple[str, Content]]:
        """`contents`, without a word for what goes wrong."""

    def state(self) -> str:
        """What changes when a file does: a digest of sizes and times, for these are had without reading."""
        found = self.path.stat()
        return hashlib.sha256(f"{found.st_size} {found.st_mtime_ns}".encode()).hexdigest()


class Folder(Container):
    """The files below a folder, links followed."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.found: dict[str, os.stat_result] = {}
        seen: set[tuple[int, int]] = set()  # folders, so that a link to one above ends
        for place, folders, files in os.walk(path, followlinks=True, onerror=raise_it):
            here = Path(place).stat()
            if (here.st_dev, here.st_ino) in seen:
                folders.clear()
                continue
            seen.add((here.st_dev, here.st_ino))
            folders[:] = sorted(folder for folder in folders if not is_hidden(folder))
            for name in files:
                self.add(Path(place, name).relative_to(path).as_posix())

    def add(self, name: str) -> None:
        if not may_be_image(name):
            return
        with contextlib.suppress(OSError):  # a link to nowhere
            found = (self.path / name).stat()
            if stat.S_ISREG(found.st_mode):  # a pipe would keep its reader waiting
                self.found[name] = found

    def names(self) -> list[str]:
        return list(self.found)

    def read(self, wanted: Sequence[str]) -> Iterator[tuple[str, Content]]:
        for name in wanted:
            try:
                with (self.path / name).open("rb") as file:
                    yield name, limited(file)
            except OSError as error:
                yield name, Unreadable(error.strerror or str(error))

    def state(self) -> str:
        lines = (
            f"{found.st_size} {found.st_mtime_ns} {name}\n" for name, found in sorted(self.found.items())
        )
        return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


class Zip(Container):
    """The members of a zip."""

    def names(self) -> list[str]:
        with zipfile.ZipFile(self.path) as archive:
            self.members = {tidy(info.filename): info for info in archive.infolist() if not info.is_dir()}
        return [name for name in self.members if may_be_image(name)]

    def read(self, wanted: Sequence[str]) -> Iterator[tuple[str, Content]]:
        with zipfile.ZipFile(self.path) as archive:
            for name in wanted:
                yield name, self.member(archive, name)

    def member(self, archive: zipfile.ZipFile, name: str) -> Content:
        try:
            with archive.open(self.members[name]) as file:
                return limited(file)
        except (*DAMAGE, RuntimeError) as error:  # a RuntimeError: encrypted, or packed in a way unknown here
            return Unreadable(str(error))


class Tar(Container):
    """The members of a tar, packed or not; it has no table of them, so it is read through each time."""

    def names(self) -> list[str]:
        with tarfile.open(self.path) as archive:
            found = (tidy(member.name) for member in archive if member.isreg())
            return list(dict.fromkeys(name for name in found if may_be_image(name)))

    def read(self, wanted: Sequence[str]) -> Iterator[tuple[str, Content]]:
        names = set(wanted)
        with tarfile.open(self.path) as archive:
            for member in archive:
                name = tidy(member.name)
                if member.isreg() and name in names:
                    file = archive.extractfile(member)
                    assert file is not None, "a regular file has content"
                    yield name, limited(file)


def opened(path: Path) -> Container:
    """The folder or archive at `path`.

    Raises:
        UserError: there is nothing, or neither a folder nor an archive that is known.
    """
    if not path.exists():
        raise UserError(f"data.root={path}: there is no such folder or file.")
    with readable(path):
        if path.is_dir():
            return Folder(path)
        if zipfile.is_zipfile(path):
            return Zip(path)
        if tarfile.is_tarfile(path):
            return Tar(path)
    raise UserError(
        f"data.root={path} is neither a folder nor a zip or a tar (.tar, .tar.gz, .tar.xz, .tar.bz2)."
    )


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """What goes wrong while a folder or an archive as a whole is read becomes the user's to mend."""
    try:
        yield
    except DAMAGE as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"data.root={path} cannot be read, or is damaged: {reason}.") from None


def limited(file: IO[bytes]) -> Content:
    """What a file holds, if that is not too much."""
    content = file.read(MAX_BYTES + 1)
    return content if len(content) <= MAX_BYTES else Unreadable(f"more than {MAX_BYTES:,} bytes")


def tidy(name: str) -> str:
    """The name of an archive's member without what means nothing, such as a leading ./"""
    return "/".join(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))


def may_be_image(name: str) -> bool:
    """By its ending; not what is hidden, nor what macOS adds to archives."""
    return name.lower().endswith(SUFFIXES) and not any(map(is_hidden, name.split("/")))


def is_hidden(part: str) -> bool:
    """Whether a file or folder of this name is none of the user's pictures."""
    return part.startswith(".") or part == "__MACOSX"


def raise_it(error: OSError) -> None:
    """A folder that cannot be listed would else be taken for an empty one."""
    raise error
