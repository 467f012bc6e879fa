"""Shared by the tests of data sets: files, a server, processes, and what a split holds."""

from __future__ import annotations

import functools
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from experiments.data import download
from runner.data import Split
from runner.streams import BatchRandom


def write(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Write files by their names, with / between folders, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder, except the lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def labelled(*splits: Split) -> list[bytes]:
    """Return each image with its label, in an order that depends on nothing else."""
    images = []
    for split in splits:
        assert split.targets is not None
        assert split.inputs.dtype == torch.uint8 and split.targets.dtype == torch.int64
        pairs = zip(split.inputs.numpy(), split.targets.tolist(), strict=True)
        images += [image.tobytes() + bytes([label]) for image, label in pairs]
    return sorted(images)


def batch_random(batch_size: int, rows: slice = slice(None), seed: int = 5) -> BatchRandom:
    return BatchRandom(seed, torch.device("cpu"), batch_size, rows)


def random_bytes(*shape: int) -> torch.Tensor:
    """Return pixels, none of them black."""
    return torch.randint(1, 256, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)


class _Handler(SimpleHTTPRequestHandler):
    server: Server

    def send_head(self):  # type: ignore[no-untyped-def]
        self.server.requests.append(f"{self.command} {self.path}")
        if self.server.hold is not None and self.command == "GET":
            self.server.hold.wait(60)
        if self.server.refuse:
            self.send_error(self.server.refuse)
            return None
        return super().send_head()

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Serve `folder`; `refuse` is the status to answer instead, `hold` what each GET waits for, if anything."""

    refuse = 0
    hold: threading.Event | None = None

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder)))
        self.folder, self.requests = folder, list[str]()
        self.url = f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, *_: object) -> None:
        """Say nothing where the client hangs up as soon as it has what it wanted."""


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


Fork = Callable[..., BaseProcess]


@pytest.fixture
def fork() -> Iterator[Fork]:
    """`fork(function, *arguments)` calls it in a process of its own, which is killed at the end of the test."""
    started: list[BaseProcess] = []

    def start(function: Callable[..., None], *arguments: object) -> BaseProcess:
        process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def wait_for(condition: Callable[[], bool], process: BaseProcess) -> None:
    """Wait until the condition holds; fail where the process ends, or after two minutes."""
    end = time.monotonic() + 120
    while not condition():
        assert process.is_alive() and time.monotonic() < end
        time.sleep(0.005)


def exit_code(process: BaseProcess) -> int | None:
    process.join(120)
    return process.exitcode
