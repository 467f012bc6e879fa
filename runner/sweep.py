"""What a multirun adds: expand the grid, check every job, run them in one folder, rank them."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override

from runner import config
from runner.build import build_job
from runner.checkpoint import replace_file
from runner.config import Call
from runner.engine import Job, Result, claim, execute
from runner.errors import UserError
from runner.tracker import text_table

NAME_LENGTH = 100  # of a job's folder; file systems end at 255 bytes


@dataclass
class Point:
    """One job of a sweep."""

    number: int
    swept: dict[str, str]  # key: value, of the keys that take several
    job: Job
    status: str = "waiting"
    error: str | None = None
    result: Result | None = None
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The folder's name: the number and what is swept, without what a file system minds."""
        values = ",".join(f"{key}={value}" for key, value in self.swept.items())
        return f"{self.number}_{re.sub(r'[^A-Za-z0-9_.,=+-]+', '-', values)}"[:NAME_LENGTH].rstrip("_")


def run_sweep(call: Call) -> int:
    """Run every combination, one after the other; exit status 1 where a job failed, 130 when interrupted.

    Raises:
        UserError: a job's config does not fit; nothing has run and nothing was written.
    """
    points = [make_point(number, swept, call) for number, swept in enumerate(expand(call))]
    folder = claim(sweep_home(points))
    print(f"Sweep of {len(points)} jobs in {folder}\n{preview(points)}\n")
    interrupted = False
    for point in points:
        point.job.folder = folder / point.name
        print(f"── job {point.number} of {len(points)}: {point.name}")
        run_point(point)
        write_leaderboard(points, folder)
        print(status_line(point), flush=True)
        if point.status == "interrupted":
            interrupted = True
            break
    print(f"\n{leaderboard_text(points)}\n\n{folder / 'leaderboard.csv'}\ntensorboard --logdir {folder}")
    return 130 if interrupted else int(any(point.status != "done" for point in points))


def expand(call: Call) -> list[dict[str, str]]:
    """Every combination of the swept values: override text by key, the last key varying fastest.

    Raises:
        UserError: a key is swept in a way that a grid does not have.
    """
    swept: dict[str, list[str]] = {}
    for override in config.parse(call.overrides):
        if override.is_sweep_override():
            swept[override.get_key_element()] = values(override)
    return [dict(zip(swept, combination, strict=True)) for combination in itertools.product(*swept.values())]


def values(override: Override) -> list[str]:
    """The values of one swept override, as they would be typed."""
    if override.is_interval_sweep():
        raise UserError(
            f"{override.input_line}: an interval has no end of values, a grid needs some: give "
            f"{override.key_or_group}=a,b,c or {override.key_or_group}=range(start,stop,step)."
        )
    return list(override.sweep_string_iterator())


def make_point(number: int, swept: dict[str, str], call: Call) -> Point:
    """Compose and check one job; nothing runs."""
    fixed = [config.text(o) for o in config.parse(call.overrides) if not o.is_sweep_override()]
    single = replace(
        call, overrides=[*fixed, *(f"{key}={value}" for key, value in swept.items())], multirun=False
    )
    door = config.door_values(single)
    if door.get("resume") is not None:
        raise UserError("resume= goes on with one run; write it without -m.")
    try:
        job = build_job(config.compose_call(single), single, door)
    except UserError as error:
        raise as_typed(error, call) from None
    return Point(number, swept, job)


def as_typed(error: UserError, call: Call) -> UserError:
    """The error with the corrected command only where its argument was typed as it stands."""
    return error if error.wrong in call.overrides else UserError(str(error))


def sweep_home(points: list[Point]) -> Path:
    """Where the sweep's folder goes: below its experiment, or beside all where it has several."""
    names = {point.job.name for point in points}
    outputs = points[0].job.outputs
    return outputs / names.pop() / "sweeps" if len(names) == 1 else outputs / "sweeps"


def run_point(point: Point) -> None:
    """Run one job; whatever it does, the sweep goes on."""
    try:
        point.result = execute(point.job)
        point.status, point.error = point.result.status, point.result.error
        point.metrics = point.result.metrics
        point.result.model = None  # the next job wants the memory
    except KeyboardInterrupt:
        point.status, point.error = "interrupted", "interrupted"
    except (Exception, SystemExit) as error:
        point.status, point.error = "failed", f"{type(error).__name__}: {error}"
        record_failure(point)
    finally:
        point.job.task = None  # type: ignore[assignment]


def record_failure(point: Point) -> None:
    """Leave the traceback and a summary in the job's folder, also where it failed before it had one."""
    folder = point.job.folder
    assert folder is not None
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "summary.json").exists():
        with (folder / "run.log").open("a", encoding="utf-8") as file:
            file.write(traceback.format_exc())
        summary = {"status": "failed", "error": point.error, "experiment": point.job.name}
        replace_file(folder / "summary.json", json.dumps(summary, indent=2).encode())


def status_line(point: Point) -> str:
    """How one job ended, with the first line of its error and where its log is."""
    if point.status == "done":
        return f"ok      {point.name}"
    first = (point.error or "").strip().splitlines()[0] if point.error else ""
    return f"{point.status.upper()}  {point.name}: {first}\n        {point.job.folder}/run.log"


def preview(points: list[Point]) -> str:
    """The jobs, swept values only."""
    keys = list(points[0].swept)
    return text_table(["job", *keys], [[p.number, *(p.swept[key] for key in keys)] for p in points])


def ranked(points: list[Point]) -> list[Point]:
    """The best first, by the experiment's objective; those without a value last."""
    minimize = points[0].job.objective.direction == "minimize"

    def order(point: Point) -> tuple[bool, float]:
        value = objective_value(point)
        return (value is None, 0.0 if value is None else value if minimize else -value)

    return sorted(points, key=order)


def objective_value(point: Point) -> float | None:
    """The best value of the objective; None where the job has none."""
    done = point.result is not None and point.status == "done" and point.result.best is not None
    return point.result.best["value"] if done and point.result and point.result.best else None


def leaderboard(points: list[Point]) -> tuple[list[str], list[list[Any]]]:
    """Header and rows: job, swept keys, status, objective, test metrics, seconds, error."""
    keys = list(points[0].swept)
    objective = points[0].job.objective.name or "objective"
    tests = sorted({name for point in points for name in point.metrics.get("test", {})})
    header = ["job", *keys, "status", objective, *(f"{name}/test" for name in tests), "seconds", "error"]
    rows = []
    for point in ranked(points):
        test = point.metrics.get("test", {})
        seconds = point.result.seconds if point.result else None
        error = (point.error or "").strip().splitlines()[:1]
        cells = [point.swept[key] for key in keys]
        found = [objective_value(point), *(test.get(name) for name in tests)]
        rows.append([point.number, *cells, point.status, *found, seconds, *(error or [""])])
    return header, rows


def write_leaderboard(points: list[Point], folder: Path) -> None:
    """`leaderboard.csv`, rewritten after every job."""
    header, rows = leaderboard(points)
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *rows])
    replace_file(folder / "leaderboard.csv", text.getvalue().encode())


def leaderboard_text(points: list[Point]) -> str:
    """The leaderboard for the screen: the swept keys and what they are ranked by; failures apart, in full."""
    header, rows = leaderboard(points)
    objective = header[len(points[0].swept) + 2]
    wanted = ["job", *points[0].swept, "status", objective, objective.replace("/val", "/test"), "seconds"]
    columns = [header.index(name) for name in dict.fromkeys(wanted) if name in header]
    table = text_table([header[c] for c in columns], [[row[c] for c in columns] for row in rows])
    failures = [f"job {point.number}: {point.error}" for point in points if point.error]
    return "\n".join([table, *(["\nFailed:"] if failures else []), *failures])
