"""The command line in a process group of its own, which can be killed as a whole at any moment."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.conftest import LIMIT, REPO

FORKS = multiprocessing.get_context("forkserver")  # a fork of a process that has torch takes no 2 s
FORKS.set_forkserver_preload(["runner.sweep.run", "runner.sweep.search.study", "tests.runner.processes"])


class Cli:
    """`python -m runner ARGV...` in `folder`, its screen in the file `output`, at the head of its own group.

    `before` is called in that process, before the command.
    """

    def __init__(
        self, folder: Path, argv: list[str], before: Callable[[], object] | None = None, **environment: str
    ):
        self.output = folder / f"screen-{time.monotonic_ns()}.txt"
        self.process = FORKS.Process(target=_enter, args=(folder, argv, before, self.output, environment))
        self.process.start()

    def wait_until(self, reached: Callable[[], bool]) -> bool:
        """Wait until something is so; return False where the process ended before."""
        end = time.monotonic() + LIMIT
        while time.monotonic() < end:
            if reached():
                return True
            if not self.process.is_alive():
                return False
            time.sleep(0.01)
        raise AssertionError(f"not reached in {LIMIT} s: {self.screen()}")

    def send(self, number: signal.Signals, whole_group: bool = True) -> None:
        """Send a signal to the whole group, as the terminal's Ctrl-C or the kernel's end, or to the leader alone."""
        assert self.process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if whole_group else os.kill)(self.process.pid, number)

    def end(self) -> int:
        """Wait for the end and return the exit status, negative for a signal."""
        self.process.join(LIMIT)
        assert self.process.exitcode is not None, self.screen()
        return self.process.exitcode

    def screen(self) -> str:
        return self.output.read_text(encoding="utf-8") if self.output.exists() else ""


@contextlib.contextmanager
def opened(folder: Path, argv: list[str], **more: Any) -> Iterator[Cli]:
    """Start a command that leaves no process behind, however the test ends."""
    cli = Cli(folder, argv, **more)
    try:
        yield cli
    finally:
        cli.send(signal.SIGKILL)
        cli.process.kill()  # if it has no group yet
        cli.process.join()


def _enter(folder: Path, argv: list[str], before: Any, output: Path, environment: dict[str, str]) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ.update(environment | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"})
    screen = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(screen, 1)
    os.dup2(screen, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8")
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8")
    sys.argv = [str(REPO / "runner" / "__main__.py")]
    from runner.cli import main

    if before is not None:
        before()
    status = main(argv)
    sys.stdout.flush()
    os._exit(status)
