"""What a sweep costs beside its jobs: milliseconds per job that does nothing, memory, and the end of the sweep.

    python -m tests.benchmarks.sweep               # 1,000 jobs in one process
    python -m cProfile -s cumulative -m tests.benchmarks.sweep --jobs 200          # and where the time goes

A job's cost is split in what comes before the first one (composed, checked, rehearsed, frozen) and what comes
with each (built again from what was frozen, its folder, log, event file and summary). Of each part there are
the wall clock, in which the disk's flushes count, and this process's own CPU time.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
from pathlib import Path

from runner.config.command import Command
from runner.sweep import run
from runner.sweep.display import Display
from runner.sweep.figures.draw import draw
from runner.sweep.leaderboard import leaderboard_text, write_leaderboard
from runner.sweep.record import Record
from tests.benchmarks.common import Row, wall_and_cpu

TOYS = Path(__file__).resolve().parent.parent / "toys"
PAGE = 4096  # bytes of a page in /proc/self/statm


class Memory(Display):
    """The sweep's display, which says nothing and notes the process's memory after each job."""

    resident: list[int] = []  # noqa: RUF012 (of the one sweep)

    def job_ended(self, record: Record) -> None:
        assert record.status == "done", record.error
        self.resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * PAGE)


def measure(jobs: int) -> dict[str, Row]:
    """Seconds by the clock and of the CPU, by part, of one sweep of jobs that do nothing, in the current folder."""
    options = ["experiment=toy_nothing", f"task.size=range({jobs // 2})", "seed=0,1", "threads=1"]
    call, made = Command.parse(options, TOYS, multirun=True), []
    run.display.Display = Memory
    run._finish = lambda *_, **__: None  # timed by itself
    work = {
        "plan": lambda: made.append(run._make_sweep(call)),
        "freeze": lambda: run.save_sweep(made[0]),
        "run": lambda: run._run(made[0]),
        "leaderboard": lambda: (
            write_leaderboard(made[0].records, made[0].home),
            leaderboard_text(made[0].records),
        ),
        "pictures": lambda: draw(made[0].records, made[0].home),
    }
    with contextlib.redirect_stdout(io.StringIO()):
        parts = {name: wall_and_cpu(part) for name, part in work.items()}
    assert len(made[0].records) == len(Memory.resident) == jobs // 2 * 2
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        parts = measure(arguments.jobs)
    for name, (wall, own) in parts.items():
        per_job = name in ("plan", "freeze", "run")
        unit, scale = ("ms per job", 1e3 / arguments.jobs) if per_job else ("s in all", 1.0)
        print(f"{name:12} {wall * scale:7.2f} {unit}, {own * scale:6.2f} {unit.split()[0]} of them CPU")
    for job in sorted({min(100, arguments.jobs), arguments.jobs}):
        print(f"memory       {Memory.resident[job - 1] / 2**20:7.1f} MiB after job {job:,}")


if __name__ == "__main__":
    main()
