"""Placing files of known content: what is damaged is never used, and one process at a time does the work."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from experiments.data.files import Source, Unavailable, ensure_files, scratch_folder
from runner.errors import UserError

CONTENT = {"one": b"first file" * 1000, "two": b"second"}
DIGESTS = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}


def written(folder: Path, content: dict[str, bytes]) -> Path:
    """The folder, holding these files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return folder


def source(folder: Path, name: str = "elsewhere") -> Source:
    return Source(name, lambda _: folder)


def forbidden(_: Path) -> Path:
    raise AssertionError("a source was asked that need not be")


def held(folder: Path) -> dict[str, bytes]:
    """What the folder holds, the lock apart."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_complete_files_need_no_source_no_lock_and_no_word(tmp_path: Path, said: list[str]) -> None:
    folder = written(tmp_path / "data", CONTENT)
    ensure_files("It", folder, DIGESTS, [Source("never", forbidden)])
    assert said == []
    assert sorted(path.name for path in folder.iterdir()) == ["one", "two"]


def test_first_source_that_has_all_is_used(tmp_path: Path, said: list[str]) -> None:
    half = written(tmp_path / "half", {"one": CONTENT["one"]})
    whole = written(tmp_path / "whole", CONTENT)
    folder = tmp_path / "deep" / "data"
    ensure_files(
        "It", folder, DIGESTS, [source(half, "half"), source(whole, "whole"), Source("never", forbidden)]
    )
    assert held(folder) == CONTENT
    assert len(said) == 2  # what is missing, and where it was found
    assert "none of its files is there" in said[0] and "whole: verified" in said[1]


def test_gz_beside_the_place_is_unpacked(tmp_path: Path) -> None:
    zipped = {f"{name}.gz": gzip.compress(content) for name, content in CONTENT.items()}
    folder = written(tmp_path / "data", zipped)
    ensure_files("It", folder, DIGESTS, [Source("never", forbidden)])
    assert held(folder) == CONTENT | zipped


def test_only_what_is_missing_is_replaced(tmp_path: Path) -> None:
    folder = written(tmp_path / "data", {"one": CONTENT["one"]})
    before = (folder / "one").stat().st_ino
    ensure_files("It", folder, DIGESTS, [source(written(tmp_path / "other", {"two": CONTENT["two"]}))])
    assert held(folder) == CONTENT
    assert (folder / "one").stat().st_ino == before


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[:-1],
    "empty": lambda content: b"",
    "altered": lambda content: bytes([content[0] ^ 1]) + content[1:],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file_in_place_is_named_and_replaced(tmp_path: Path, said: list[str], damage: str) -> None:
    folder = written(tmp_path / "data", CONTENT | {"one": DAMAGE[damage](CONTENT["one"])})
    ensure_files("It", folder, DIGESTS, [source(written(tmp_path / "other", CONTENT))])
    assert "one is damaged" in said[0] and "two" not in said[0]
    assert held(folder) == CONTENT


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_source_is_named_and_not_used(tmp_path: Path, damage: str) -> None:
    bad = written(tmp_path / "bad", CONTENT | {"one": DAMAGE[damage](CONTENT["one"])})
    folder = tmp_path / "data"
    with pytest.raises(UserError, match=r"bad: one is damaged"):
        ensure_files("It", folder, DIGESTS, [source(bad, "bad")])
    assert held(folder) == {}


def cut(packed: bytes) -> bytes:
    return packed[:-12]


def flipped(packed: bytes) -> bytes:
    middle = len(packed) // 2
    return packed[:middle] + bytes([packed[middle] ^ 0xFF]) + packed[middle + 1 :]


def no_gzip(packed: bytes) -> bytes:
    return b"<html>not found</html>"


def other_content(packed: bytes) -> bytes:
    return gzip.compress(b"well packed, and wrong")


@pytest.mark.parametrize("damage", [cut, flipped, no_gzip, other_content])
def test_damaged_gz_is_named_and_not_used(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    packed = gzip.compress(CONTENT["one"])
    bad = written(tmp_path / "bad", {"one.gz": damage(packed), "two": CONTENT["two"]})
    folder = tmp_path / "data"
    with pytest.raises(UserError, match=r"bad: one\.gz is damaged"):
        ensure_files("It", folder, DIGESTS, [source(bad, "bad")])
    assert held(folder) == {}
    ensure_files("It", folder, DIGESTS, [source(bad, "bad"), source(written(tmp_path / "good", CONTENT))])
    assert held(folder) == CONTENT


def test_error_names_all_that_was_tried_and_how_to_place_the_files(tmp_path: Path) -> None:
    def refuse(_: Path) -> Path:
        raise Unavailable("shut today")

    folder = written(tmp_path / "data", {"two": b"damaged"})
    with pytest.raises(UserError) as caught:
        ensure_files("It", folder, DIGESTS, [source(tmp_path / "none", "Elsewhere"), Source("Shop", refuse)])
    message = str(caught.value)
    assert message.startswith("It cannot be had.")
    assert "one is missing; two is damaged (7 bytes" in message
    assert "Elsewhere: one is not there" in message and "Shop: shut today" in message
    for name, digest in DIGESTS.items():
        assert f"{name}  {digest}" in message
    assert f"into {folder}" in message
    assert held(folder) == {"two": b"damaged"}


def test_what_a_kill_left_aside_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    written(folder / ".aside", {"one": b"half"})
    written(folder / ".aside" / "source", {"two": b"half"})

    def empty(scratch: Path) -> Path:
        assert list(scratch.iterdir()) == []
        return written(scratch, CONTENT)

    ensure_files("It", folder, DIGESTS, [Source("fresh", empty)])
    assert held(folder) == CONTENT


def test_scratch_folder_begins_empty_and_ends_gone(tmp_path: Path) -> None:
    written(tmp_path / ".aside" / "source", {"two": b"half"})
    with scratch_folder(tmp_path) as scratch:
        assert list(scratch.iterdir()) == []
        written(scratch, CONTENT)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "deep/data"])
def test_file_where_the_folder_should_be(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("here")
    with pytest.raises(UserError, match=r"Nothing can be put into .*data\.root="):
        ensure_files("It", tmp_path / "file" / below, DIGESTS, [Source("never", forbidden)])


@contextlib.contextmanager
def read_only(content: dict[str, bytes]) -> Iterator[Path]:
    """A folder of these files that may be read and not written, by root either, who becomes nobody."""
    with tempfile.TemporaryDirectory() as home:  # tmp_path lies under a folder that is closed to others
        Path(home).chmod(0o755)
        folder = written(Path(home) / "data", content)
        folder.chmod(0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            if not os.access(folder, os.R_OK, effective_ids=True):
                pytest.skip(f"nobody may read in {home}")
            with pytest.raises(PermissionError):
                (folder / "new").touch()
            yield folder
        finally:
            if root:
                os.seteuid(0)
            folder.chmod(0o755)


def test_read_only_folder_without_the_files() -> None:
    refused = pytest.raises(UserError, match=r"Nothing can be put into .*Permission denied")
    with read_only({"one": CONTENT["one"]}) as folder, refused:
        ensure_files("It", folder, DIGESTS, [Source("never", forbidden)])


def test_read_only_folder_with_the_files() -> None:
    with read_only(CONTENT) as folder:
        ensure_files("It", folder, DIGESTS, [Source("never", forbidden)])


# One process of two: it says when its source is asked, and goes on when it is let.
PROCESS = """
import logging, sys, time
from pathlib import Path
from experiments.data.files import Source, ensure_files
from tests.experiments.data.test_files import CONTENT, DIGESTS, written

here, name = Path(sys.argv[1]), sys.argv[2]
logging.basicConfig(level=logging.INFO, format="%(message)s", filename=here / f"{name}.log")

def find(scratch):
    (scratch / "one").write_bytes(b"half")
    (here / f"{name}.asked").touch()
    while not (here / f"{name}.go").exists():
        time.sleep(0.005)
    return written(scratch, CONTENT)

ensure_files("It", here / "data", DIGESTS, [Source("slow", find)])
"""


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Until the condition holds, or the process ends, or a minute has gone."""
    end = time.monotonic() + 60
    while not condition():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture
def start(tmp_path: Path, environment: dict[str, str]) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []

    def call(name: str) -> subprocess.Popen[bytes]:
        started.append(
            subprocess.Popen([sys.executable, "-c", PROCESS, str(tmp_path), name], env=environment)
        )
        return started[-1]

    yield call
    for process in started:
        process.kill()
        process.wait()


Start = Callable[[str], "subprocess.Popen[bytes]"]


def test_two_processes_at_once_fetch_once(tmp_path: Path, start: Start) -> None:
    first = start("first")
    wait_for((tmp_path / "first.asked").exists, first)
    second = start("second")
    log = tmp_path / "second.log"
    wait_for(lambda: log.exists() and "Waiting for another run" in log.read_text(), second)
    (tmp_path / "first.go").touch()
    assert first.wait(60) == 0 and second.wait(60) == 0
    assert not (tmp_path / "second.asked").exists()
    assert held(tmp_path / "data") == CONTENT


def test_killed_process_leaves_nothing_that_harms(tmp_path: Path, start: Start) -> None:
    killed = start("killed")
    wait_for((tmp_path / "killed.asked").exists, killed)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert (tmp_path / "data" / ".aside").exists() and not (tmp_path / "data" / "one").exists()
    ensure_files("It", tmp_path / "data", DIGESTS, [source(written(tmp_path / "other", CONTENT))])
    assert held(tmp_path / "data") == CONTENT


def test_waiting_process_takes_over_from_a_killed_one(tmp_path: Path, start: Start) -> None:
    killed = start("killed")
    wait_for((tmp_path / "killed.asked").exists, killed)
    waiting = start("waiting")
    log = tmp_path / "waiting.log"
    wait_for(lambda: log.exists() and "Waiting for another run" in log.read_text(), waiting)
    killed.kill()
    (tmp_path / "waiting.go").touch()
    assert waiting.wait(60) == 0
    assert held(tmp_path / "data") == CONTENT
