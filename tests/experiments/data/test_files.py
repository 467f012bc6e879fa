"""Placing files of known content: what is damaged is never used, and one process at a time does the work."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import pytest

from experiments.data.files import Source, SourceError, ensure_files
from tests.experiments.data.conftest import contents, race, refusal, stop_at_gate, write

CONTENT = {"one": b"first file" * 1000, "two": b"second"}
DIGESTS = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}
ONE, PACKED = CONTENT["one"], gzip.compress(CONTENT["one"])


def at(folder: Path) -> Source:
    return Source(folder.name, lambda _: folder)


def forbidden(_: Path) -> Path:
    raise AssertionError("a source was asked that need not be")


def ensure(folder: Path, *sources: Source) -> None:
    """Ensure the files; a source after the last of these must not be asked."""
    ensure_files("It", folder, DIGESTS, [*sources, Source("never", forbidden)])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "data"


@pytest.fixture
def other(tmp_path: Path) -> Source:
    """A source that has both files."""
    return at(write(tmp_path / "other", CONTENT))


def test_complete_files_need_no_source_no_lock_and_no_message(data, said):
    ensure(write(data, CONTENT))
    assert said == []
    assert sorted(path.name for path in data.iterdir()) == ["one", "two"]


def test_first_source_that_has_all_is_used(tmp_path, data, other, said):
    ensure(data, at(write(tmp_path / "half", {"one": ONE})), other)
    assert contents(data) == CONTENT
    assert len(said) == 2 and "other: verified" in said[1]  # what is missing, and where it was found


def test_gz_beside_the_place_is_unpacked(data):
    packed = {f"{name}.gz": gzip.compress(content) for name, content in CONTENT.items()}
    ensure(write(data, packed))
    assert contents(data) == CONTENT | packed


DAMAGED = {
    "truncated": ("one", ONE[:-1]),
    "empty": ("one", b""),
    "altered": ("one", b"F" + ONE[1:]),
    "cut gz": ("one.gz", PACKED[:-12]),
    "flipped gz": ("one.gz", PACKED[:30] + bytes([PACKED[30] ^ 0xFF]) + PACKED[31:]),
    "no gz": ("one.gz", b"<html>not found</html>"),
    "gz of other content": ("one.gz", gzip.compress(b"well packed, and wrong")),
}


@pytest.mark.parametrize(("name", "content"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_file_or_source_is_named_and_never_used(tmp_path, data, other, said, name, content):
    bad = at(write(tmp_path / "bad", {"two": CONTENT["two"], name: content}))
    refusal(lambda: ensure_files("It", data, DIGESTS, [bad]), f"bad: {name} is damaged")
    assert contents(data) == {}
    ensure(data, bad, other)
    assert contents(data) == CONTENT

    # in place: only what is damaged is replaced
    before = (data / "two").stat().st_ino
    (data / "one").unlink()
    said.clear()
    ensure(write(data, {name: content}), other)
    assert "one is " in said[0] and "two" not in said[0] and f"{name} is damaged" in "".join(said)
    assert (data / "one").read_bytes() == ONE and (data / "two").stat().st_ino == before


def test_error_names_all_that_was_tried_and_how_to_place_the_files(tmp_path, data):
    def refuse(_: Path) -> Path:
        raise SourceError("shut today")

    write(data, {"two": b"damaged"})
    sources = [at(tmp_path / "elsewhere"), Source("Shop", refuse)]
    tried = ("one is missing; two is damaged (7 bytes", "elsewhere: one not found", "Shop: shut today")
    by_hand = [f"{name}  {digest}" for name, digest in DIGESTS.items()]
    refusal(lambda: ensure_files("It", data, DIGESTS, sources), *tried, *by_hand, f"into {data}")
    assert contents(data) == {"two": b"damaged"}


def test_scratch_folder_begins_empty_and_ends_gone(data):
    """Whatever a killed process left in it."""

    def fetch(scratch: Path) -> Path:
        assert list(scratch.iterdir()) == []
        return write(scratch, CONTENT)

    ensure(write(data, {".aside/one": b"half", ".aside/source/two": b"half"}), Source("new", fetch))
    assert contents(data) == CONTENT


def test_folder_that_cannot_be_written_serves_if_it_has_the_files(data):
    (write(data, CONTENT) / ".lock").mkdir()  # which stops root, too
    ensure(data)
    (data / "one").unlink()
    for path in (data, data / "two", data / "two" / "deep" / "data"):
        refusal(lambda path=path: ensure(path), "cannot write to ", "data.root=")


@pytest.mark.parametrize("end", ["finishes", "is killed"])
def test_second_process_fetches_only_if_the_first_was_killed(tmp_path, data, said, other, end):
    def fetch(scratch: Path) -> Path:
        (scratch / "one").write_bytes(b"half")
        stop_at_gate(tmp_path)
        return write(scratch, CONTENT)

    race(tmp_path, said, lambda: ensure(data, Source("slow", fetch)), lambda: ensure(data, other), end)
    assert any("Trying other sources" in line for line in said) == (end == "is killed")
    assert contents(data) == CONTENT
