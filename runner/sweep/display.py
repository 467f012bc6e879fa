"""The screen of a sweep: its jobs before the first one, a line for each that ended, the time left."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from runner.engine.report import tensorboard_command
from runner.errors import first_line
from runner.records.console import format_cell, live_line, print_line, shown_path, text_table
from runner.sweep.record import ENDED, Record

_JOBS_SHOWN = 20  # in a preview


def preview(records: Sequence[Record]) -> str:
    """Return a table of the jobs with their swept values; of many the first and the last."""
    keys = list(dict.fromkeys(key for record in records for key in record.swept))
    rows = [[record.number, *(record.swept.get(key) for key in keys)] for record in records]
    if len(rows) > _JOBS_SHOWN:
        rows = [*rows[: _JOBS_SHOWN - 2], ["…", *("…" for _ in keys)], rows[-1]]
    return text_table(["job", *keys], rows)


def space_preview(space: Mapping[str, str], total: int) -> str:
    """Return a table of a search's space."""
    rows = [[key, values] for key, values in space.items()]
    return f"{text_table(['key', 'drawn from'], rows, left=2)}\n{total} trials in all"


def skipped(records: Sequence[Record], total: int) -> str:
    """List the jobs that ended before and are not run again; of many the number alone."""
    ended = [record for record in records if record.status in ENDED]
    if len(ended) > _JOBS_SHOWN:
        return f"skipped: {len(ended)} of {total} have ended before"
    return "\n".join(f"skipped: {record.name} has ended before ({record.status})" for record in ended)


class Display:
    """One line for each job that has ended, above a bar of all jobs with the time that is left."""

    def __init__(self, sweep: Path, total: int, ended: int):
        self.sweep, self.total, self.ended = sweep, total, ended
        self._start, self._ended_before = time.monotonic(), ended
        self._bar = live_line(total, ended, "{n_fmt}/{total_fmt} jobs {bar} {remaining} left")

    def job_ended(self, record: Record) -> None:
        """Print the line of a job that has ended."""
        self.ended += 1
        seconds = (time.monotonic() - self._start) / max(1, self.ended - self._ended_before)
        left = seconds * (self.total - self.ended)
        time_left = f"{left:.0f} s" if left < 100 else f"{left / 60:.0f} min"
        count = f"[{self.ended}/{self.total}{f', {time_left} left' * (left >= 1)}]"
        print_line(f"{count} {_status_line(record, self.sweep)}")
        self._bar.update()

    def resize(self, total: int) -> None:
        """Change the number of jobs."""
        self.total = self._bar.total = total
        self._bar.refresh()

    def close(self) -> None:
        self._bar.close()


def _status_line(record: Record, sweep: Path) -> str:
    """Describe how one job ended; where it did not end well, why, and where its log is."""
    if record.status == "done":
        value = f"  {record.objective} {format_cell(record.value)}" if record.value is not None else ""
        seconds = "" if record.seconds is None else f"  {record.seconds:.1f} s"
        return f"ok: {record.name}{value}{seconds}"
    status = "FAILED" if record.status == "failed" else record.status
    text = f"{status}: {record.name}"
    if record.error:
        text += f": {first_line(record.error)}"
    log = record.folder(sweep) / "run.log"
    return f"{text}\n  see {shown_path(log)}" if record.status == "failed" and log.exists() else text


def summary(records: Sequence[Record], sweep: Path, resume: str, trials_left: bool) -> str:
    """Return how many jobs ended how, where the results are, and the commands that go on from here.

    `trials_left` says that a search was interrupted, whose next trials are no jobs yet.
    """
    counts = Counter("ok" if record.status == "done" else record.status for record in records)
    states = ", ".join(f"{count} {status}" for status, count in counts.items())
    lines = [
        f"{states or 'no job has run'}: {shown_path(sweep / 'leaderboard.md')}",
        f"tensorboard: {tensorboard_command(sweep)}",
    ]
    if trials_left or set(counts) - {"ok", "pruned", "running"}:
        lines.append(f"go on with what is left: {resume}")
    return "\n".join(lines)
