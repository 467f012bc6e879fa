"""What a sweep says on the screen: the jobs before the first one, a line for each that ended, the time left."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from runner.engine.report import watch
from runner.records.console import format_cell, live_line, quote, shown_path, text_table
from runner.sweep.record import ENDED, Record

SHOWN = 20  # jobs of the preview


def preview(records: Sequence[Record]) -> str:
    """The jobs, swept values only; of many the first and the last."""
    keys = list(dict.fromkeys(key for record in records for key in record.swept))
    rows = [[record.number, *(record.swept.get(key) for key in keys)] for record in records]
    if len(rows) > SHOWN:
        rows = [*rows[: SHOWN - 2], ["…", *("…" for _ in keys)], rows[-1]]
    return text_table(["job", *keys], rows)


def space_preview(space: dict[str, str], total: int) -> str:
    """What a search draws from."""
    rows = [[key, values] for key, values in space.items()]
    return f"{text_table(['key', 'drawn from'], rows, left=2)}\n{total} trials in all"


def skipped(records: Sequence[Record], total: int) -> str:
    """The jobs that ended before and are not run again; of many their number alone."""
    ended = [record for record in records if record.status in ENDED]
    if len(ended) > SHOWN:
        return f"skipped: {len(ended)} of {total} have ended before"
    return "\n".join(f"skipped: {record.name} has ended before ({record.status})" for record in ended)


class Display:
    """One line for each job that has ended, above a bar of all jobs with the time that is left."""

    def __init__(self, sweep: Path, total: int, ended: int, resume: str):
        self.sweep, self.total, self.ended, self.resume = sweep, total, ended, resume
        self.start, self.first = time.monotonic(), ended
        self.bar = live_line(total, ended, "{n_fmt}/{total_fmt} jobs {bar} {remaining} left")

    def told(self, record: Record) -> None:
        """A job has ended."""
        self.ended += 1
        tqdm.write(
            f"[{self.ended}/{self.total}{self.time_left()}] {status_line(record, self.sweep)}", sys.stdout
        )
        sys.stdout.flush()
        self.bar.update()

    def resize(self, total: int) -> None:
        """There are to be so many jobs."""
        self.total = self.bar.total = total
        self.bar.refresh()

    def time_left(self) -> str:
        """An estimate from the jobs so far, in words."""
        seconds = (time.monotonic() - self.start) / max(1, self.ended - self.first)
        left = seconds * (self.total - self.ended)
        if left < 1:
            return ""
        return f", {left:.0f} s left" if left < 100 else f", {left / 60:.0f} min left"

    def close(self) -> None:
        self.bar.close()


def status_line(record: Record, sweep: Path) -> str:
    """How one job ended; where it did not end well, why, and what to look at."""
    if record.status == "done":
        value = f"  {record.objective} {format_cell(record.value)}" if record.value is not None else ""
        seconds = "" if record.seconds is None else f"  {record.seconds:.1f} s"
        return f"ok: {record.name}{value}{seconds}"
    word = "FAILED" if record.status == "failed" else record.status
    text = f"{word}: {record.name}"
    if record.error:
        text += f": {first_line(record.error)}"
    log = record.folder(sweep) / "run.log"
    return f"{text}\n  see {shown_path(log)}" if record.status == "failed" and log.exists() else text


def first_line(error: str | None) -> str:
    """The first line of an error that may have many, or none."""
    return next(iter((error or "").strip().splitlines()), "")


def ending(records: Sequence[Record], sweep: Path, resume: str) -> str:
    """How many came to what, where the results are, how to look at them and how to go on."""
    counts = Counter("ok" if record.status == "done" else record.status for record in records)
    states = ", ".join(f"{count} {status}" for status, count in counts.items())
    lines = [f"{states}: {shown_path(sweep / 'leaderboard.md')}", f"watch: {watch(sweep)}"]
    if set(counts) - {"ok", "pruned", "running"}:
        lines.append(f"go on with what is left: {resume}")
    return "\n".join(lines)


def resume_command(command: str, sweep: Path) -> str:
    """What takes the sweep up again."""
    return f"{command} -m resume={quote(sweep)}"
