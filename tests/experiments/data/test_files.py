"""Placing files of known content: what is damaged is never used, and one process at a time does the work."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.data.files import Source, SourceError, ensure_files
from runner.errors import UserError
from tests.experiments.data.conftest import contents, race, refusal, stop_at_gate, write

CONTENT = {"one": b"first file" * 1000, "two": b"second"}
DIGESTS = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}


def at(folder: Path) -> Source:
    return Source(folder.name, lambda _: folder)


def ensure(folder: Path, *sources: Source) -> None:
    """Ensure the files; a source after the last of these must not be asked."""

    def forbidden(_: Path) -> Path:
        raise AssertionError("a source was asked that need not be")

    ensure_files("It", folder, DIGESTS, [*sources, Source("never", forbidden)])


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
    data, bad = tmp_path / "data", at(write(tmp_path / "bad", {"two": CONTENT["two"], name: content}))
    refusal(lambda: ensure_files("It", data, DIGESTS, [bad]), f"bad: {name} is damaged")
    assert contents(data) == {}
    ensure(data, bad, other)
    assert contents(data) == CONTENT


def test_error_names_all_that_was_tried_and_how_to_place_the_files(tmp_path: Path) -> None:
    def refuse(_: Path) -> Path:
        raise SourceError("shut today")

    folder = write(tmp_path / "data", {"two": b"damaged"})
    sources = [at(tmp_path / "elsewhere"), Source("Shop", refuse)]
    tried = ("one is missing; two is damaged (7 bytes", "elsewhere: one not found", "Shop: shut today")
    by_hand = [f"{name}  {digest}" for name, digest in DIGESTS.items()]
    refusal(lambda: ensure_files("It", folder, DIGESTS, sources), *tried, *by_hand, f"into {folder}")
    assert contents(folder) == {"two": b"damaged"}


def test_scratch_folder_begins_empty_and_ends_gone(tmp_path: Path) -> None:
    """Whatever a killed process left in it."""

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


@pytest.mark.parametrize("end", ["finishes", "is killed"])
def test_second_process_fetches_only_if_the_first_was_killed(
    tmp_path: Path, said: list[str], other: Source, end: str
) -> None:
    def fetch(scratch: Path) -> Path:
        (scratch / "one").write_bytes(b"half")
        stop_at_gate(tmp_path)
        return write(scratch, CONTENT)

    data = tmp_path / "data"
    race(tmp_path, said, lambda: ensure(data, Source("slow", fetch)), lambda: ensure(data, other), end)
    assert any("Trying other sources" in line for line in said) == (end == "is killed")
    assert contents(data) == CONTENT
