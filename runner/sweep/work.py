"""One job of a sweep, in whatever process: taken up where it stands, run, its failure written at once."""

from __future__ import annotations

import contextlib
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from runner.build.builder import build_job
from runner.config.command import Command
from runner.config.compose import Composed
from runner.engine.job import Job
from runner.engine.session import execute
from runner.errors import UserError
from runner.files import replace_file
from runner.sweep.isolation import isolated, release_memory
from runner.sweep.record import ENDED, STATE_FOLDER, Record

PruneCallback = Callable[[int, float], bool]
POLL = 0.3  # seconds between looks at files that other processes write


@dataclass(frozen=True)
class Work:
    """What a process needs to run jobs of a sweep; it travels to other processes."""

    sweep: Path
    command: Command  # whose folder and packages are trusted
    trust: str | None
    retries: int = 0
    stop_on_error: bool = False
    columns: tuple[str, ...] = ()  # of the HParams page
    invocation: str = ""  # tells apart several calls that run jobs of one sweep at the same time

    def __call__(
        self,
        record: Record,
        judge: PruneCallback | None = None,
        wait: bool = True,
        stop: StopRequest | None = None,
    ) -> bool:
        """Run one job, unless it has ended or the sweep is to stop; whatever it does, this returns.

        What it came to is in its folder, and in `record`. `stop` tells the job when to save and end; without, it
        takes the signals itself. Returns False where another process runs it, and `wait` is False or the sweep
        is to stop.
        """
        self.locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.locks / f"{record.number}.lock")  # a process that dies lets go of it
        while not lock.is_locked:
            try:
                lock.acquire(timeout=POLL if wait else 0)
            except Timeout:
                if not wait or self.stop_file.exists():
                    return False
        try:
            self.locked(record, judge, stop)
        finally:
            lock.release()
        return True

    def locked(self, record: Record, judge: PruneCallback | None, stop: StopRequest | None) -> None:
        """Run a job that no other process runs."""
        record.refresh(self.sweep)
        if record.status in ENDED or self.stop_file.exists():
            return
        with (self.locks / f"{record.number}.starts").open("a") as file:
            file.write("x")
        for left in range(self.retries, -1, -1):
            with isolated():
                self.attempt(record, judge, stop)
            release_memory()
            if record.status != "failed" or left == 0 or self.stop_file.exists():
                break
            times = f"{left} more time{'s' * (left > 1)}"
            tqdm.write(f"failed: {record.name}: {record.error}; it is tried {times}", sys.stdout)
            sys.stdout.flush()
        if record.status == "interrupted" or (record.status == "failed" and self.stop_on_error):
            self.stop_file.touch()

    @property
    def locks(self) -> Path:
        """Where the jobs' locks are, and how often each was started."""
        return self.sweep / STATE_FOLDER / "locks"

    @property
    def stop_file(self) -> Path:
        """While it is there, no further job starts."""
        return self.sweep / STATE_FOLDER / "stop"

    @property
    def interrupt_file(self) -> Path:
        """While it is there, the jobs of this invocation save and end."""
        return self.sweep / STATE_FOLDER / f"interrupt-{self.invocation}"

    def interrupt(self) -> None:
        """Let the jobs that run save and end, and start no further one."""
        with contextlib.suppress(OSError):  # such as no space: a terminal's signal reaches the workers anyway
            self.interrupt_file.touch()
            self.stop_file.touch()

    def starts(self, record: Record) -> int:
        """How often the job was started."""
        path = self.locks / f"{record.number}.starts"
        return path.stat().st_size if path.exists() else 0

    def is_held(self, record: Record) -> bool:
        """Whether some process runs the job at this moment."""
        try:
            with FileLock(self.locks / f"{record.number}.lock", timeout=0):
                return False
        except Timeout:
            return True

    def attempt(self, record: Record, judge: PruneCallback | None, stop: StopRequest | None) -> None:
        """Run the job once, from its last checkpoint where there is one."""
        folder = record.folder(self.sweep)
        problem = None
        (folder / "summary.json").unlink(missing_ok=True)  # it tells of the try before
        try:
            job = self.build(record)
            job.should_prune, job.stop = judge, stop
            execute(job)
        except KeyboardInterrupt:  # it may come when the job has ended but for a line
            self.interrupt()
            record.status, record.error = "interrupted", "stopped before its folder was made"
            if not folder.exists():
                return
        except UserError as error:
            problem = str(error)
            record_failure(record, folder, problem, problem)
        except (Exception, SystemExit) as error:
            problem = f"{type(error).__name__}: {error}"
            record_failure(record, folder, problem, traceback.format_exc())
        record.refresh(self.sweep)

    def build(self, record: Record) -> Job:
        """The job as it was frozen, in its folder."""
        composed = Composed(record.config, record.overrides)
        job = build_job(composed, self.command, {"trust": self.trust})
        job.changes = list(record.changes)
        job.folder, job.quiet, job.columns = record.folder(self.sweep), True, self.columns
        if job.folder.exists():
            job.resume = job.folder
        return job


class StopRequest:
    """Tell a worker's job to save and end: by a signal to the worker, or by `file`, which the sweep writes.

    A terminal's Ctrl-C reaches the sweep and its workers, `kill` reaches one process: both work, and so do both
    together.
    """

    def __init__(self, file: Path):
        self.file, self.requested, self.next_look = file, False, 0.0

    def __call__(self) -> bool:
        if not self.requested and time.monotonic() >= self.next_look:
            self.next_look = time.monotonic() + POLL
            self.requested = self.file.exists()
        return self.requested

    def signal(self, number: int, frame: Any) -> None:
        """Handle a signal."""
        self.requested = True


def record_failure(record: Record, folder: Path, error: str, details: str) -> None:
    """Leave what went wrong and a summary in the job's folder, unless the run has done so itself."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "summary.json").exists():
        return
    with (folder / "run.log").open("a", encoding="utf-8") as file:
        file.write(details.rstrip() + "\n")
    summary = {"status": "failed", "error": error, "experiment": record.experiment}
    replace_file(folder / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False).encode())
