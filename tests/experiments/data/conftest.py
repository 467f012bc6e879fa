"""Shared by the tests of data sets: files, a server, processes, and what a split holds."""

from __future__ import annotations

import functools
import io
import multiprocessing
import tarfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.data import download
from runner.data import Split
from runner.errors import UserError
from runner.streams import BatchRandom
from tests.conftest import LIMIT


def write(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Write files by their names, with / between folders, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def tar_of(files: Iterable[tuple[str, bytes]], packing: str) -> bytes:
    """Return a tar of files, packed as `gz`, `xz` or not."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode=f"w:{packing}") as tar:  # type: ignore[call-overload]
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return target.getvalue()


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder, except the lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def pairs(images: Sequence[np.ndarray], labels: Iterable[int] = ()) -> list[bytes]:
    """Return each image with its label, if they have any, in an order that depends on nothing else."""
    ends = [bytes([label]) for label in labels] or [b""] * len(images)
    return sorted(image.tobytes() + end for image, end in zip(images, ends, strict=True))


def held(*splits: Split) -> list[bytes]:
    """Return `pairs` of the images and targets of these splits together."""
    labels = [split.targets for split in splits if split.targets is not None]
    assert {split.inputs.dtype for split in splits} == {torch.uint8}
    assert {targets.dtype for targets in labels} <= {torch.int64}
    images = [image.numpy() for split in splits for image in split.inputs]
    return pairs(images, [label for targets in labels for label in targets.tolist()])


def sizes(splits: Mapping[str, Split]) -> dict[str, int]:
    return {name: len(split) for name, split in splits.items()}


def assert_whole(load, train, test, folder, files):  # type: ignore[no-untyped-def]
    """`load(seed)` gives these `pairs`, 10 of them for val by the seed alone; the folder has nothing but `files`."""
    splits = load(0)
    assert sizes(splits) == {"train": len(train) - 10, "val": 10, "test": len(test)}
    assert held(splits["train"], splits["val"]) == train and held(splits["test"]) == test
    assert torch.equal(load(0)["val"].inputs, splits["val"].inputs)
    assert not torch.equal(load(1)["val"].inputs, splits["val"].inputs)
    assert contents(folder).items() <= files.items()


def refusal(load: Callable[[], object], *parts: str) -> UserError:
    """Return the UserError, whose message has all these parts."""
    with pytest.raises(UserError) as caught:
        load()
    assert [part for part in parts if part not in str(caught.value)] == []
    return caught.value


def batch_random(batch_size: int, rows: slice = slice(None), seed: int = 5) -> BatchRandom:
    return BatchRandom(seed, torch.device("cpu"), batch_size, rows)


def random_bytes(*shape: int) -> torch.Tensor:
    """Return pixels, none of them black."""
    return torch.randint(1, 256, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)


class _Handler(SimpleHTTPRequestHandler):
    server: Server

    def send_head(self):  # type: ignore[no-untyped-def]
        self.server.requests.append(f"{self.command} {self.path}")
        self.server.go.wait(60)
        return super().send_head()

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Serve `folder` while `go` is set."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder)))
        self.folder, self.requests, self.go = folder, list[str](), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/"
        self.go.set()

    def handle_error(self, *_: object) -> None:
        """Say nothing where the client hangs up."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server in this process of the folder `served`, which has all the time that a busy machine takes."""
    monkeypatch.setattr(download, "TIMEOUT", 60)
    monkeypatch.setenv("no_proxy", "*")
    server = Server(write(tmp_path / "served", {}))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def stop_at_gate(home: Path) -> None:
    """Say that this place is reached, and go on when `race` opens the gate."""
    (home / "reached").touch()
    while not (home / "open").exists():
        time.sleep(0.005)


def race(
    home: Path, said: list[str], slow: Callable[[], object], work: Callable[[], object], end: str
) -> None:
    """Do `work` while another process does `slow`, which stops at the gate; that one `finishes` or `is killed`."""

    def wait_for(condition: Callable[[], bool]) -> None:
        limit = time.monotonic() + LIMIT
        while not condition():
            assert process.is_alive() and time.monotonic() < limit
            time.sleep(0.005)

    process = multiprocessing.get_context("fork").Process(target=slow)
    process.start()
    try:
        with ThreadPoolExecutor(1) as pool:
            wait_for((home / "reached").exists)
            waiting = pool.submit(work)
            wait_for(lambda: any(line.startswith("Waiting for another run") for line in said))
            process.kill() if end == "is killed" else (home / "open").touch()
            waiting.result(LIMIT)
        process.join(LIMIT)
        assert (process.exitcode == 0) == (end == "finishes")
    finally:
        process.kill()
