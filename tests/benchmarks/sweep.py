"""What a sweep costs beside its jobs: milliseconds per job that does nothing, memory, and the end of the sweep.

    python -m tests.benchmarks.sweep               # 1,000 jobs in one process
    python -m tests.benchmarks.sweep --jobs 200
    python -m tests.benchmarks.sweep --profile     # and where the time goes

A job's cost is split in what comes before the first one (composed, checked, rehearsed, frozen) and what comes
with each (built again from what was frozen, its folder, log, event file and summary). Of each part there are
the wall clock, in which the disk's flushes count, and this process's own CPU time.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import io
import os
import pstats
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runner.config.command import Command
from runner.sweep import run
from runner.sweep.display import Display
from runner.sweep.figures.draw import draw
from runner.sweep.leaderboard import leaderboard_text, write_leaderboard
from runner.sweep.record import Record

TOYS = Path(__file__).resolve().parent.parent / "toys"
PAGE = 4096  # bytes of a page in /proc/self/statm


class Memory(Display):
    """The sweep's display, which says nothing and notes the process's memory after each job."""

    resident: list[int] = []  # noqa: RUF012 (of the one sweep)

    def job_ended(self, record: Record) -> None:
        assert record.status == "done", record.error
        self.resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * PAGE)


def measure(jobs: int) -> dict[str, tuple[float, float]]:
    """Seconds by the clock and of the CPU, by part, of one sweep of jobs that do nothing, in the current folder."""
    parts = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        wall, own = time.perf_counter(), time.process_time()
        result = work()
        parts[name] = time.perf_counter() - wall, time.process_time() - own
        return result

    half = jobs // 2
    call = Command.parse(
        ["experiment=toy_nothing", f"task.size=range({half})", "seed=0,1", "threads=1"], TOYS, multirun=True
    )
    run.display.Display = Memory
    run._finish = lambda *_, **__: None  # timed by itself
    with contextlib.redirect_stdout(io.StringIO()):
        sweep = timed("plan", lambda: run._make_sweep(call))
        timed("freeze", lambda: run.save_sweep(sweep))
        status = timed("run", lambda: run._run(sweep))
        timed(
            "leaderboard",
            lambda: (write_leaderboard(sweep.records, sweep.home), leaderboard_text(sweep.records)),
        )
        timed("pictures", lambda: draw(sweep.records, sweep.home))
    assert status == 0 and len(sweep.records) == 2 * half
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    profiler = cProfile.Profile()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        if arguments.profile:
            profiler.enable()
        parts = measure(arguments.jobs)
        profiler.disable()
        os.chdir(TOYS)
    for name in ("plan", "freeze", "run"):
        wall, own = (1e3 * seconds / arguments.jobs for seconds in parts[name])
        print(f"{name:12} {wall:7.2f} ms per job, {own:6.2f} ms of them CPU")
    for name in ("leaderboard", "pictures"):
        wall, own = parts[name]
        print(f"{name:12} {wall:7.2f} s in all, {own:6.2f} s of them CPU")
    for job in sorted({min(100, arguments.jobs), arguments.jobs}):
        print(f"memory       {Memory.resident[job - 1] / 2**20:7.1f} MiB after job {job:,}")
    if arguments.profile:
        pstats.Stats(profiler).sort_stats("cumulative").print_stats(60)


if __name__ == "__main__":
    main()
