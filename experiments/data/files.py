"""Files of known content: found or fetched, verified by sha256, put in place whole, one process at a time."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import logging
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from runner.errors import UserError
from runner.files import replace_file

log = logging.getLogger("runner")


class Unavailable(Exception):
    """A source that does not give the files; the text is the reason, for the user."""


class Absent(Unavailable):
    """A folder that was looked into and does not have them: nothing to report unless all else fails."""


@dataclass(frozen=True)
class Source:
    """A place to have the files from.

    `find(scratch)` gives a folder that holds them, as they are or as .gz, and may fetch into the empty folder
    `scratch`, which is removed afterwards. It raises Unavailable, saying why, where it cannot.
    """

    name: str
    find: Callable[[Path], Path]


def ensure_files(
    what: str,
    folder: Path,
    digests: Mapping[str, str],
    sources: Sequence[Source],
    ways_out: Sequence[str] = (),
) -> None:
    """Make `folder` hold the files that `digests` names by their sha256, from the first source that has them.

    A file of other content is never left to be used: it is named and replaced. `ways_out` are lines that end
    the message where no source has them, in the place of how to put each file there by hand.

    Raises:
        UserError: no source has them, or the folder cannot be written; the message says what was tried.
    """
    if not faults(folder, digests):
        return
    with writable(folder), locked(folder):
        found = faults(folder, digests)  # another process may have been faster
        if found:
            beside = Source(f"as .gz in {folder}", lambda _: folder)
            _find(what, folder, digests, [beside, *sources], found, ways_out or by_hand(folder, digests))


def _find(
    what: str,
    folder: Path,
    digests: Mapping[str, str],
    sources: Sequence[Source],
    found: Mapping[str, str],
    ways_out: Sequence[str],
) -> None:
    """Put what was found missing or damaged in place, from the first source that has it."""
    there = any((folder / name).exists() for name in digests)
    state = "; ".join(found.values()) if there else "none of its files is there"
    log.info(f"{what} is not in {folder}: {state}. Looking elsewhere.")
    tried: dict[object, object] = {folder: state}
    for source in sources:
        try:
            _place(source, folder, {name: digests[name] for name in found})
        except Unavailable as reason:
            if not isinstance(reason, Absent):
                log.info(f"  {source.name}: {reason}")
            tried[source.name] = reason
        else:
            log.info(f"  {source.name}: verified, now in {folder}")
            return
    lines = [f"{what} cannot be had. Tried:", *(f"  {name}: {reason}" for name, reason in tried.items())]
    raise UserError("\n".join([*lines, *ways_out]))


def digest_of_files(digests: Mapping[str, str]) -> str:
    """One sha256 for files that were verified, from their own."""
    lines = (f"{digest}  {name}\n" for name, digest in digests.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def home_of(folder: str, name: str = "root") -> Path:
    """The folder that an argument `name` names, ~ being the user's home."""
    if not folder:
        raise ValueError(f"{name} must name a folder")
    try:
        return Path(folder).expanduser()
    except RuntimeError:  # ~name, and there is no such user
        raise ValueError(f"{name} names a home folder that there is not: {folder}") from None


def faults(folder: Path, digests: Mapping[str, str]) -> dict[str, str]:
    """What is wrong with each file that is not as it must be, by name."""
    found = {}
    for name, digest in digests.items():
        path = folder / name
        try:
            with path.open("rb") as file:
                fits = hashlib.file_digest(file, "sha256").hexdigest() == digest
        except (FileNotFoundError, NotADirectoryError):
            found[name] = f"{name} is missing"
        except OSError as error:
            found[name] = f"{name} cannot be read ({error.strerror})"
        else:
            if not fits:
                found[name] = f"{name} is damaged ({path.stat().st_size:,} bytes, wrong sha256)"
    return found


def _place(source: Source, folder: Path, digests: Mapping[str, str]) -> None:
    """Read and verify every file of a source first, then put each in place."""
    with scratch_folder(folder) as scratch:
        given = scratch / "source"
        given.mkdir(exist_ok=True)
        home = source.find(given)
        contents = {name: read_verified(home, name, digest) for name, digest in digests.items()}
        for name, content in contents.items():
            replace_file(folder / name, content)


def read_verified(folder: Path, name: str, digest: str) -> bytes:
    """The content of `name`, or of `name`.gz unpacked, in `folder`, if it has the sha256 that it must have.

    Raises:
        Unavailable: neither is there, or what is there is damaged.
    """
    reasons = []
    for path, opened in ((folder / name, open), (folder / f"{name}.gz", gzip.open)):
        if not path.is_file():
            continue
        try:
            with opened(path, "rb") as file:
                content = file.read()
        except (OSError, EOFError, zlib.error) as error:
            reasons.append(f"{path.name} is damaged ({error})")
            continue
        if hashlib.sha256(content).hexdigest() == digest:
            return content
        reasons.append(f"{path.name} is damaged ({len(content):,} bytes, wrong sha256)")
    raise Unavailable("; ".join(reasons)) if reasons else Absent(f"{name} is not there")


@contextlib.contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """An empty folder on the file system of `folder`; under the lock, so one that is there was left by a kill."""
    scratch = folder / ".aside"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(exist_ok=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time; the system frees the lock of one that was killed."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info(f"Waiting for another run that puts files into {folder}.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def writable(folder: Path) -> Iterator[None]:
    """The folder made where it is not; what the file system refuses becomes the user's to mend."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(
            f"Nothing can be put into {folder}: {error.strerror or error}. data.root=FOLDER chooses another place."
        ) from None


def by_hand(folder: Path, digests: Mapping[str, str]) -> list[str]:
    """How to place the files oneself."""
    return [
        f"To place them by hand, put these files into {folder} (unpacked, as the sha256 has it, or as .gz):",
        *(f"  {name}  {digest}" for name, digest in digests.items()),
    ]
