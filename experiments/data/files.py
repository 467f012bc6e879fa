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


class SourceError(Exception):
    """A source cannot give the files; the text is the reason, for the user."""


class NotHere(SourceError):
    """A folder does not have the files, which is reported only if no other source has them."""


@dataclass(frozen=True)
class Source:
    """A place that may have the files.

    `fetch(scratch)` returns a folder that holds them, as they are or as .gz. It may download into the empty folder
    `scratch`, which is removed afterwards, and raises SourceError if it cannot.
    """

    name: str
    fetch: Callable[[Path], Path]


def ensure_files(
    title: str, folder: Path, digests: Mapping[str, str], sources: Sequence[Source], hints: Sequence[str] = ()
) -> None:
    """Make `folder` hold the files that `digests` names by their sha256, from the first source that has them.

    A file of other content is never used: it is reported and replaced. `hints` are the lines that end the message
    where no source has the files, instead of how to place each of them by hand.

    Raises:
        UserError: no source has them, or the folder cannot be written; the message says what was tried.
    """
    if not problems(folder, digests):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            if invalid := problems(folder, digests):  # another process may have been faster
                _obtain(title, folder, digests, sources, invalid, hints)
    except OSError as error:
        problem = f"cannot write to {folder}: {error.strerror or error}"
        raise UserError(f"{problem}; choose another folder: data.root=FOLDER") from None


def _obtain(
    title: str,
    folder: Path,
    digests: Mapping[str, str],
    sources: Sequence[Source],
    invalid: Mapping[str, str],
    hints: Sequence[str],
) -> None:
    """Put the `invalid` files (name → problem) in place, from the first source that has them all."""
    # what is wrong
    empty = not any((folder / name).exists() for name in digests)
    state = "none of its files is there" if empty else "; ".join(invalid.values())
    log.info(f"{title} is not in {folder}: {state}. Trying other sources.")

    # the sources, in order; each has all of the files before one is put in place
    tried = {str(folder): state}
    for source in [Source(f"as .gz in {folder}", lambda _: folder), *sources]:
        try:
            with scratch_folder(folder) as scratch:
                home = source.fetch(scratch)
                contents = {name: read_verified(home, name, digests[name]) for name in invalid}
                for name, content in contents.items():
                    replace_file(folder / name, content)
            log.info(f"  {source.name}: verified, now in {folder}")
            return
        except SourceError as reason:
            if not isinstance(reason, NotHere):
                log.info(f"  {source.name}: {reason}")
            tried[source.name] = str(reason)

    # none has them
    lines = (f"  {name}: {reason}" for name, reason in tried.items())
    by_hand = [
        f"To place them by hand, put these files into {folder}, unpacked (their sha256 is given) or as .gz:",
        *(f"  {name}  {digest}" for name, digest in digests.items()),
    ]
    raise UserError("\n".join([f"could not obtain {title}. Tried:", *lines, *(hints or by_hand)]))


def digest_of_files(digests: Mapping[str, str]) -> str:
    """Return one sha256 for verified files, made of their own."""
    lines = (f"{digest}  {name}\n" for name, digest in digests.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def expand_folder(folder: str, argument: str = "root") -> Path:
    """Return the folder that `argument` names, with ~ expanded."""
    if not folder:
        raise ValueError(f"{argument} must be a path: data.{argument}=PATH")
    try:
        return Path(folder).expanduser()
    except RuntimeError:
        raise ValueError(f"{argument} names the home of an unknown user: {folder}") from None


def problems(folder: Path, digests: Mapping[str, str]) -> dict[str, str]:
    """Return what is wrong with each file that does not have its sha256, by name."""
    invalid = {}
    for name, digest in digests.items():
        path = folder / name
        try:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    size = path.stat().st_size
                    invalid[name] = f"{name} is damaged ({size:,} bytes, wrong sha256)"
        except (FileNotFoundError, NotADirectoryError):
            invalid[name] = f"{name} is missing"
        except OSError as error:
            invalid[name] = f"{name} cannot be read ({error.strerror})"
    return invalid


def read_verified(folder: Path, name: str, digest: str) -> bytes:
    """Return the content of `name`, or of `name`.gz unpacked, in `folder`, if it has this sha256.

    Raises:
        SourceError: neither exists (NotHere), or those that do are damaged.
    """
    reasons = []
    for path, opener in ((folder / name, open), (folder / f"{name}.gz", gzip.open)):
        if not path.is_file():
            continue
        try:
            with opener(path, "rb") as file:
                content: bytes = file.read()
            if hashlib.sha256(content).hexdigest() == digest:
                return content
            reasons.append(f"{path.name} is damaged ({len(content):,} bytes, wrong sha256)")
        except (OSError, EOFError, zlib.error) as error:
            reasons.append(f"{path.name} is damaged ({error})")
    raise SourceError("; ".join(reasons)) if reasons else NotHere(f"{name} not found")


@contextlib.contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder on the file system of `folder`; to be used under the lock, so an old one is a kill's."""
    scratch = folder / ".aside"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(exist_ok=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def locked(folder: Path) -> contextlib.AbstractContextManager[object]:
    """Let one process at a time in; the system frees the lock of a process that was killed."""
    lock = FileLock(folder / ".lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        log.info(f"Waiting for another run that writes to {folder}.")
        return lock.acquire()
