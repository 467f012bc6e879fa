"""What a multirun adds: expand the grid, check every job, run them in one folder, rank them."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import re
import traceback
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override

from runner import config
from runner.build import build_job
from runner.config import Call
from runner.engine import claim, execute
from runner.errors import UserError
from runner.files import replace_file
from runner.job import Job, Result
from runner.report import quote, shown_path, watch
from runner.tracker import metric_order, text_table

NAME_LENGTH = 100  # of a job's folder; file systems end at 255 bytes


@dataclass
class Point:
    """One job of a sweep."""

    number: int
    swept: dict[str, str]  # key: value, of the keys that take several
    job: Job
    status: str = "not run"
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
    print(f"Sweep of {len(points)} jobs in {shown_path(folder)}\n{preview(points)}")
    interrupted = False
    for place, point in enumerate(points, start=1):
        point.job.folder = folder / point.name
        print(f"\n── {place} of {len(points)} ── {point.name}", flush=True)
        run_point(point)
        write_leaderboard(points, folder)
        print(status_line(point), flush=True)
        interrupted = point.status == "interrupted"
        if interrupted:
            break
    print(f"\n{leaderboard_text(points)}\n\n{ending(points, folder)}", flush=True)
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
    words = {"True": "true", "False": "false"}  # Hydra gives Python's; what was quoted keeps its quotes
    return [words.get(value, value) for value in override.sweep_string_iterator()]


def make_point(number: int, swept: dict[str, str], call: Call) -> Point:
    """Compose and check one job; nothing runs."""
    fixed = [config.text(o) for o in config.parse(call.overrides) if not o.is_sweep_override()]
    single = replace(
        call, overrides=[*fixed, *(f"{key}={value}" for key, value in swept.items())], multirun=False
    )
    door = config.door_values(single)
    for key, does in (("resume", "goes on with"), ("checkpoint", "looks at")):
        if door.get(key) is not None:
            raise UserError(f"{key}= {does} one run; write it without -m.")
    try:
        job = build_job(config.compose_call(single), single, door)
    except UserError as error:
        raise as_typed(error, call) from None
    return Point(number, swept, job)


def as_typed(error: UserError, call: Call) -> UserError:
    """One job's error with the correction made in what was typed: its key, or the one value of several."""
    if error.wrong is None or error.wrong in call.overrides:
        return error
    key, _, value = error.wrong.partition("=")
    typed = next((override for override in call.overrides if override.startswith(f"{key}=")), None)
    if typed is None or not error.right:
        return UserError(str(error))
    right_key, _, right_value = error.right.partition("=")
    among = rf"(?<![\w.-]){re.escape(value)}(?![\w.-])"  # the whole word: not the rn of rnn
    values = typed.removeprefix(key)
    if value != right_value:
        values = re.sub(among, lambda _: right_value, values, count=1)
    return UserError(str(error), typed, right_key + values)


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
        point.status, point.error = "interrupted", "stopped before its folder was made"
    except UserError as error:
        point.status, point.error = "failed", str(error)
        record_failure(point, point.error)
    except (Exception, SystemExit) as error:
        point.status, point.error = "failed", f"{type(error).__name__}: {error}"
        record_failure(point, traceback.format_exc())
    finally:
        point.job.task = None  # type: ignore[assignment]


def record_failure(point: Point, what: str) -> None:
    """Leave what went wrong and a summary in the job's folder, also where it failed before it had one."""
    folder = point.job.folder
    assert folder is not None
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "summary.json").exists():
        with (folder / "run.log").open("a", encoding="utf-8") as file:
            file.write(what.rstrip() + "\n")
        summary = {"status": "failed", "error": point.error, "experiment": point.job.name}
        replace_file(folder / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False).encode())


def first_line(error: str | None) -> str:
    """The first line of an error that may have many, or none."""
    return next(iter((error or "").strip().splitlines()), "")


def status_line(point: Point) -> str:
    """How one job ended; where it did not end well, why, and what to look at or to type."""
    if point.status == "done":
        return f"done: {point.name}"
    folder = point.job.folder
    assert folder is not None
    text = f"{point.status.upper()}: {point.name}"
    if point.error:
        text += f": {first_line(point.error)}"
    if point.status == "interrupted" and folder.exists():
        return f"{text}\n  go on with this job: {point.job.command} resume={quote(folder)}"
    return f"{text}\n  see {shown_path(folder / 'run.log')}" if folder.exists() else text


def ending(points: list[Point], folder: Path) -> str:
    """Where the results are and how to look at them."""
    counts = Counter(point.status for point in points)
    states = ", ".join(f"{count} {status}" for status, count in counts.items())
    return f"{states}: {shown_path(folder / 'leaderboard.csv')}\nwatch: {watch(folder)}"


def preview(points: list[Point]) -> str:
    """The jobs, swept values only."""
    keys = list(points[0].swept)
    return text_table(["job", *keys], [[p.number, *(p.swept[key] for key in keys)] for p in points])


def ranked(points: list[Point]) -> list[Point]:
    """The best first; those without a value last; what has another objective cannot be compared, so apart."""
    objectives = list(dict.fromkeys(point.job.objective for point in points))

    def order(point: Point) -> tuple[int, bool, float]:
        value, objective = objective_value(point), point.job.objective
        sign = 1 if objective.direction == "minimize" else -1
        return (objectives.index(objective), value is None, 0.0 if value is None else sign * value)

    return sorted(points, key=order)


def objective_value(point: Point) -> float | None:
    """The best value of the objective; None where the job has none."""
    if point.status != "done" or point.result is None or point.result.best is None:
        return None
    value = point.result.best["value"]
    return value if math.isfinite(value) else None


def leaderboard(points: list[Point]) -> tuple[list[str], list[list[Any]]]:
    """Header and rows: job, swept keys, status, objective, test metrics, seconds, error, folder.

    Where the jobs have several objectives, a column says which and the next one gives the value.
    """
    keys = list(points[0].swept)
    names = list(dict.fromkeys(point.job.objective.name or "objective" for point in points))
    one = len(names) == 1
    tests = sorted({name for point in points for name in point.metrics.get("test", {})}, key=metric_order)
    measured = names if one else ["objective", "value"]
    header = ["job", *keys, "status", *measured, *(f"{name}/test" for name in tests)]
    rows = []
    for point in ranked(points):
        test = point.metrics.get("test", {})
        value = objective_value(point)
        rows.append(
            [
                point.number,
                *(point.swept[key] for key in keys),
                point.status,
                *([value] if one else [point.job.objective.name, value]),
                *(test.get(name) for name in tests),
                None if point.result is None else round(point.result.seconds, 3),
                first_line(point.error),
                point.name,
            ]
        )
    return [*header, "seconds", "error", "folder"], rows


def write_leaderboard(points: list[Point], folder: Path) -> None:
    """`leaderboard.csv`, rewritten after every job."""
    header, rows = leaderboard(points)
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    replace_file(folder / "leaderboard.csv", text.getvalue().encode())


def leaderboard_text(points: list[Point]) -> str:
    """The leaderboard for the screen: the swept keys, what ranks them, that on the test set; what failed."""
    header, rows = leaderboard(points)
    objectives = {point.job.objective.name or "loss/val" for point in points}
    tests = [name.replace("/val", "/test") for name in sorted(objectives)]
    wanted = ["job", *points[0].swept, "status", *objectives, "objective", "value", *tests, "seconds"]
    columns = [header.index(name) for name in dict.fromkeys(wanted) if name in header]
    columns = [c for c in columns if any(row[c] is not None for row in rows)]
    table = text_table([header[c] for c in columns], [[row[c] for c in columns] for row in rows])
    failures = [f"  {p.name}: {first_line(p.error)}" for p in points if p.status == "failed"]
    return "\n".join([table, *(["\nfailed:"] if failures else []), *failures])
