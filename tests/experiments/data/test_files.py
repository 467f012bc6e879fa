"""Placing files of known content: what is damaged is never used, and one process at a time does the work."""

from __future__ import annotations

import gzip
import hashlib
import logging
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.data.files import Source, SourceError, ensure_files, scratch_folder
from runner.errors import UserError
from tests.experiments.data.conftest import Fork, contents, exit_code, wait_for, write

CONTENT = {"one": b"first file" * 1000, "two": b"second"}
DIGESTS = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}


def at(folder: Path) -> Source:
    return Source(folder.name, lambda _: folder)


def ensure(folder: Path, *sources: Source) -> None:
    """Ensure the files; a source after the last of these must not be asked."""

    def forbidden(_: Path) -> Path:
        raise AssertionError("a source was asked that need not be")

    ensure_files("It", folder, DIGESTS, [*sources, Source("never", forbidden)])


def refusal(folder: Path, *sources: Source) -> str:
    with pytest.raises(UserError) as caught:
        ensure_files("It", folder, DIGESTS, sources)
    return str(caught.value)


@pytest.fixture
def other(tmp_path: Path) -> Source:
    """A source that has both files."""
    return at(write(tmp_path / "other", CONTENT))


def test_complete_files_need_no_source_no_lock_and_no_message(tmp_path: Path, said: list[str]) -> None:
    ensure(write(tmp_path / "data", CONTENT))
    assert said == []
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["one", "two"]


def test_first_source_that_has_all_is_used(tmp_path: Path, other: Source, said: list[str]) -> None:
    half = write(tmp_path / "half", {"one": CONTENT["one"]})
    ensure(tmp_path / "deep" / "data", at(half), other)
    assert contents(tmp_path / "deep" / "data") == CONTENT
    assert len(said) == 2 and "other: verified" in said[1]  # what is missing, and where it was found


def test_gz_beside_the_place_is_unpacked(tmp_path: Path) -> None:
    packed = {f"{name}.gz": gzip.compress(content) for name, content in CONTENT.items()}
    folder = write(tmp_path / "data", packed)
    ensure(folder)
    assert contents(folder) == CONTENT | packed


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[:-1],
    "empty": lambda content: b"",
    "altered": lambda content: bytes([content[0] ^ 1]) + content[1:],
}
PACKED = gzip.compress(CONTENT["one"])
BAD_FILES = {damage: ("one", function(CONTENT["one"])) for damage, function in DAMAGE.items()} | {
    "cut gz": ("one.gz", PACKED[:-12]),
    "flipped gz": ("one.gz", PACKED[:30] + bytes([PACKED[30] ^ 0xFF]) + PACKED[31:]),
    "no gz": ("one.gz", b"<html>not found</html>"),
    "gz of other content": ("one.gz", gzip.compress(b"well packed, and wrong")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file_is_replaced(tmp_path: Path, other: Source, said: list[str], damage: str) -> None:
    folder = write(tmp_path / "data", CONTENT | {"one": DAMAGE[damage](CONTENT["one"])})
    before = (folder / "two").stat().st_ino
    ensure(folder, other)
    assert "one is damaged" in said[0] and "two" not in said[0]
    assert (folder / "two").stat().st_ino == before  # only what is damaged is replaced
    assert contents(folder) == CONTENT


@pytest.mark.parametrize("damage", BAD_FILES)
def test_damaged_source_is_named_and_not_used(tmp_path: Path, other: Source, damage: str) -> None:
    name, content = BAD_FILES[damage]
    bad = write(tmp_path / "bad", {"two": CONTENT["two"], name: content})
    assert f"bad: {name} is damaged" in refusal(tmp_path / "data", at(bad))
    assert contents(tmp_path / "data") == {}
    ensure(tmp_path / "data", at(bad), other)
    assert contents(tmp_path / "data") == CONTENT


def test_error_names_all_that_was_tried_and_how_to_place_the_files(tmp_path: Path) -> None:
    def refuse(_: Path) -> Path:
        raise SourceError("shut today")

    folder = write(tmp_path / "data", {"two": b"damaged"})
    message = refusal(folder, at(tmp_path / "elsewhere"), Source("Shop", refuse))
    assert "one is missing; two is damaged (7 bytes" in message
    assert "elsewhere: one not found" in message and "Shop: shut today" in message
    assert all(f"{name}  {digest}" in message for name, digest in DIGESTS.items())
    assert f"into {folder}" in message
    assert contents(folder) == {"two": b"damaged"}


def test_scratch_folder_begins_empty_and_ends_gone(tmp_path: Path) -> None:
    """Whatever a killed process left in it."""
    write(tmp_path, {".aside/one": b"half", ".aside/source/two": b"half"})
    with scratch_folder(tmp_path) as scratch:
        assert list(scratch.iterdir()) == []
        write(scratch, CONTENT)
    assert list(tmp_path.iterdir()) == []

    def fetch(scratch: Path) -> Path:
        assert list(scratch.iterdir()) == []
        return write(scratch, CONTENT)

    write(tmp_path, {".aside/one": b"half", ".aside/source/two": b"half"})
    ensure(tmp_path, Source("new", fetch))
    assert contents(tmp_path) == CONTENT


def test_folder_that_cannot_be_written_serves_if_it_has_the_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", CONTENT)
    (folder / ".lock").mkdir()  # which stops root, too
    ensure(folder)
    (folder / "one").unlink()
    for path in (folder, folder / "two", folder / "two" / "deep" / "data"):
        with pytest.raises(UserError, match=r"cannot write to .*data\.root="):
            ensure(path)


def slow_process(home: Path, name: str) -> None:
    """Say when the source is asked, and go on when `home` has a file `NAME.go`."""
    logging.getLogger("runner").handlers = [logging.FileHandler(home / f"{name}.log")]
    logging.getLogger("runner").setLevel(logging.INFO)

    def fetch(scratch: Path) -> Path:
        (scratch / "one").write_bytes(b"half")
        (home / f"{name}.asked").touch()
        while not (home / f"{name}.go").exists():
            time.sleep(0.005)
        return write(scratch, CONTENT)

    ensure(home / "data", Source("slow", fetch))


@pytest.mark.parametrize("end", ["finishes", "is killed"])
def test_second_process_fetches_only_if_the_first_was_killed(tmp_path: Path, fork: Fork, end: str) -> None:
    first = fork(slow_process, tmp_path, "first")
    wait_for((tmp_path / "first.asked").exists, first)
    second = fork(slow_process, tmp_path, "second")
    log = tmp_path / "second.log"
    wait_for(lambda: log.exists() and "Waiting for another run" in log.read_text(), second)
    if end == "is killed":
        first.kill()
        exit_code(first)
        assert not (tmp_path / "data" / "one").exists()
        (tmp_path / "second.go").touch()
    else:
        (tmp_path / "first.go").touch()
        assert exit_code(first) == 0
    assert exit_code(second) == 0
    assert (tmp_path / "second.asked").exists() == (end == "is killed")
    assert contents(tmp_path / "data") == CONTENT
