"""One job of a sweep, in whatever process: resumed where it stands, run, its failure written at once."""

from __future__ import annotations

import contextlib
import json
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig

from runner.build.job import build_callbacks, build_job
from runner.config.command import Command
from runner.config.compose import Composed
from runner.config.hydra_job import HydraJob
from runner.engine.session import execute
from runner.engine.state import PruneCallback
from runner.errors import UserError
from runner.files import replace_file
from runner.records.console import print_line
from runner.sweep.isolation import isolated, release_memory
from runner.sweep.record import ENDED, STATE_FOLDER, Record

POLL = 0.3  # seconds between checks of files that other processes write


@dataclass(frozen=True)
class Work:
    """What a process needs to run jobs of a sweep; it travels to other processes."""

    sweep: Path
    command: Command  # whose folder and `trust=` package are trusted
    hydra: DictConfig  # Hydra's own node
    retries: int = 0
    stop_on_error: bool = False
    columns: tuple[str, ...] = ()  # of the HParams page
    invocation: str = ""  # tells apart several commands that run jobs of one sweep at the same time
    callbacks: list[Any] | None = None  # of it; None: another process builds its own

    def __call__(
        self,
        record: Record,
        should_prune: PruneCallback | None = None,
        wait: bool = True,
        stop: StopRequest | None = None,
    ) -> bool:
        """Run one job, unless it has ended or the sweep is to stop; however the job ends, this returns.

        The outcome is in its folder, and in `record`. `stop` tells the job when to save and end; without, it
        handles the signals itself. Returns False where another process runs it, and `wait` is False or the
        sweep is to stop.
        """
        self._locks.mkdir(parents=True, exist_ok=True)
        lock = self._lock(record)
        while not lock.is_locked:
            try:
                lock.acquire(timeout=POLL if wait else 0)
            except Timeout:
                if not wait or self.stop_file.exists():
                    return False
        try:
            self._run_locked(record, should_prune, stop)
        finally:
            lock.release()
        return True

    def _run_locked(
        self, record: Record, should_prune: PruneCallback | None, stop: StopRequest | None
    ) -> None:
        """Run a job that no other process runs."""
        record.refresh(self.sweep)
        if record.status in ENDED or self.stop_file.exists():
            return
        with (self._locks / f"{record.number}.starts").open("a") as file:
            file.write("x")

        # the attempts
        for left in range(self.retries, -1, -1):
            with isolated():
                self._attempt(record, should_prune, stop)
            release_memory()
            if record.status != "failed" or left == 0 or self.stop_file.exists():
                break
            times = f"{left} more time{'s' * (left > 1)}"
            print_line(f"failed: {record.name}: {record.error}; trying {times}")
        if record.status == "interrupted" or (record.status == "failed" and self.stop_on_error):
            self.stop_file.touch()

    @property
    def _locks(self) -> Path:
        """Folder of the jobs' locks, and how often each was started."""
        return self.sweep / STATE_FOLDER / "locks"

    def _lock(self, record: Record) -> FileLock:
        """Return the lock of a job; a process that dies lets go of it."""
        return FileLock(self._locks / f"{record.number}.lock")

    @property
    def stop_file(self) -> Path:
        """While it exists, no further job starts."""
        return self.sweep / STATE_FOLDER / "stop"

    @property
    def interrupt_file(self) -> Path:
        """While it exists, the jobs of this command save and end."""
        return self.sweep / STATE_FOLDER / f"interrupt-{self.invocation}"

    def interrupt(self) -> None:
        """End the sweep: running jobs save and end, and no further one starts."""
        with contextlib.suppress(OSError):  # such as no space: a terminal's signal reaches the workers anyway
            self.interrupt_file.touch()
            self.stop_file.touch()

    def starts(self, record: Record) -> int:
        """Return how often the job was started."""
        path = self._locks / f"{record.number}.starts"
        return path.stat().st_size if path.exists() else 0

    def is_held(self, record: Record) -> bool:
        """Return whether some process runs the job at this moment."""
        with contextlib.suppress(Timeout), self._lock(record).acquire(timeout=0):
            return False
        return True

    def _attempt(self, record: Record, should_prune: PruneCallback | None, stop: StopRequest | None) -> None:
        """Run the job once, from its last checkpoint where there is one."""
        folder = record.folder(self.sweep)
        (folder / "summary.json").unlink(missing_ok=True)  # of the attempt before
        try:
            composed = Composed(record.config, record.overrides, hydra=self._hydra_job(record))
            job = build_job(composed, self.command)
            job.changes, job.columns = list(record.changes), self.columns
            job.folder, job.resume, job.quiet = folder, folder if folder.exists() else None, True
            job.should_prune, job.stop = should_prune, stop
            execute(job)

        # however it ends, its folder says so
        except KeyboardInterrupt:  # it may come when the job has ended but for a line
            self.interrupt()
            record.status, record.error = "interrupted", "stopped before its folder was made"
            if not folder.exists():
                return
        except UserError as error:
            record_failure(record, self.sweep, str(error))
        except (Exception, SystemExit) as error:
            message = f"{type(error).__name__}: {error}"
            record_failure(record, self.sweep, message, traceback.format_exc())
        record.refresh(self.sweep)

    def _hydra_job(self, record: Record) -> HydraJob:
        """Return what Hydra knows of a job, with its callbacks."""
        typed, choices = record.overrides, record.choices
        job = HydraJob.of(self.hydra, record.config, typed, record.number, choices, self.sweep)
        callbacks = self.callbacks
        if callbacks is None:
            callbacks = build_callbacks(job.callback_nodes(), self.command)
        job.callbacks.callbacks = callbacks
        return job


class StopRequest:
    """Tell a worker's job to save and end: by a signal to the worker, or by `file`, which the sweep writes.

    A terminal's Ctrl-C reaches the sweep and its workers, `kill` reaches one process: both work, and so do both
    together.
    """

    def __init__(self, file: Path):
        self._file, self._requested, self._next_check = file, False, 0.0

    def __call__(self) -> bool:
        if not self._requested and time.monotonic() >= self._next_check:
            self._next_check = time.monotonic() + POLL
            self._requested = self._file.exists()
        return self._requested

    def handle_signal(self, number: int, frame: Any) -> None:
        self._requested = True


def record_failure(record: Record, sweep: Path, error: str, details: str | None = None) -> None:
    """Write an error and a summary into the job's folder, unless the run has done so itself, and read them."""
    folder = record.folder(sweep)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "summary.json").exists():
        with (folder / "run.log").open("a", encoding="utf-8") as file:
            file.write((details or error).rstrip() + "\n")
        summary = {"status": "failed", "error": error, "experiment": record.experiment}
        replace_file(folder / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False).encode())
    record.refresh(sweep)
