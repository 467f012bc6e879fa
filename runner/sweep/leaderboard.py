"""What a sweep came to: its runs ranked by their objective, those that differ in the seed alone folded into one row.

`leaderboard.csv` has every digit, `leaderboard.md` and the screen what a person reads, `runs.csv` every run.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.config.command import show
from runner.config.options import leaves
from runner.files import replace_file
from runner.records.console import format_cell, markdown_table, metric_order, text_table
from runner.sweep.record import Record

SEED = "seed"
LONGEST = 32  # characters of a swept value on the screen
FAILURES = 10  # shown on the screen


@dataclass
class Row:
    """One setting: the runs that differ in their seed alone."""

    settings: dict[str, str | None]  # value by swept key, the seed apart
    records: list[Record]

    @property
    def done(self) -> list[Record]:
        """The runs that count."""
        return [record for record in self.records if record.status == "done"]

    @property
    def values(self) -> list[float]:
        """The objective's value of each run that is done and has one."""
        return [record.value for record in self.done if record.value is not None]

    @property
    def runs(self) -> str:
        """How many runs are done: `3`, or `2 of 3`."""
        done, planned = len(self.done), len(self.records)
        return str(done) if done == planned else f"{done} of {planned}"

    @property
    def status(self) -> str:
        """`done` where all are; else what became of those that are not, and of those without a value."""
        counts = Counter(record.status for record in self.records)
        del counts["done"]
        if len(self.records) == 1:
            return self.records[0].status
        texts = [f"{count} {status}" for status, count in counts.items()]
        without = len(self.done) - len(self.values)
        if self.values and without:
            texts.append(f"{without} without a value")
        return ", ".join(texts) or "done"

    @property
    def jobs(self) -> str:
        """The runs' numbers."""
        return " ".join(str(record.number) for record in self.records)

    def test(self, metric: str) -> list[float]:
        """A metric on the test set, of each run that is done and has it."""
        found = [record.metrics.get("test", {}).get(metric) for record in self.done]
        return [value for value in found if value is not None]

    def seconds(self) -> list[float]:
        """How long each run took that is done."""
        return [record.seconds for record in self.done if record.seconds is not None]


def mean(values: Sequence[float]) -> float | None:
    """The mean, None of nothing."""
    return statistics.fmean(values) if values else None


def deviation(values: Sequence[float]) -> float | None:
    """The sample's standard deviation (n − 1 below), None of fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def swept_keys(records: Iterable[Record]) -> list[str]:
    """The keys that the sweep sets, in the order of their first job, the seed apart."""
    return list(dict.fromkeys(key for record in records for key in record.swept if key != SEED))


def setting(record: Record, key: str) -> str | None:
    """A key's value as it is typed; of a job that leaves it alone, what its config says."""
    if key in record.swept:
        return record.swept[key]
    node: Any = record.config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return None if node is None or isinstance(node, dict) else show(node)


def seedless(record: Record) -> str:
    """The config without its seed, and without what was derived from it (`data.split_seed: ${seed}`)."""
    seed = record.config.get(SEED)
    kept = [
        (key, value)
        for key, value in leaves(record.config)
        if key != SEED and not (key.endswith(SEED) and value == seed and key not in record.swept)
    ]
    return repr(kept)


def fold(records: Sequence[Record]) -> list[Row]:
    """One row per setting, the best first; those without a value last, and each objective apart."""
    keys = swept_keys(records)
    found: dict[tuple[Any, ...], Row] = {}
    for record in records:
        settings = {key: setting(record, key) for key in keys}
        place = (*settings.values(), seedless(record))
        found.setdefault(place, Row(settings, [])).records.append(record)
    return ranked(list(found.values()))


def ranked(rows: list[Row]) -> list[Row]:
    """The rows by the mean of their objective; what has another objective cannot be compared, so it stands apart."""
    aims = list(dict.fromkeys(aim(row.records[0]) for row in rows))

    def order(row: Row) -> tuple[int, bool, float]:
        objective = aim(row.records[0])
        value, sign = mean(row.values), 1 if objective[1] == "minimize" else -1
        return (aims.index(objective), value is None, 0.0 if value is None else sign * value)

    return sorted(rows, key=order)


def aim(record: Record) -> tuple[str | None, str]:
    """What a run's value is of, and which way is better."""
    return record.objective, record.direction


def objectives(records: Iterable[Record]) -> list[str]:
    """The objectives that there are."""
    return list(dict.fromkeys(record.objective for record in records if record.objective is not None))


def test_metrics(records: Iterable[Record]) -> list[str]:
    """The metrics on the test set that any run has."""
    return sorted({name for record in records for name in record.metrics.get("test", {})}, key=metric_order)


def value_header(records: Sequence[Record]) -> list[str]:
    """The columns of the value: named by the one objective, or two where the runs have several."""
    names = objectives(records)
    return names if len(names) < 2 else ["objective", "value"]


def value_cells(record: Record, header: list[str], value: Any) -> list[Any]:
    """A value in the columns of `value_header`."""
    return [record.objective, value] if len(header) == 2 else [value] * len(header)


def leaderboard(records: Sequence[Record]) -> tuple[list[str], list[list[Any]]]:
    """Header and rows of `leaderboard.csv`: settings, runs, means and deviations, seconds, status, jobs."""
    keys, value, tests = swept_keys(records), value_header(records), test_metrics(records)
    measured = [*value[-1:], *(f"{name}/test" for name in tests)]
    header = [*keys, "runs", *value[:-1], *(text for name in measured for text in (name, f"{name} std"))]
    rows = []
    for row in fold(records):
        samples = [*([row.values] if value else []), *(row.test(name) for name in tests)]
        numbers = [number for sample in samples for number in (mean(sample), deviation(sample))]
        objective = [row.records[0].objective] if len(value) == 2 else []
        seconds = mean(row.seconds())
        rows.append([*row.settings.values(), row.runs, *objective, *numbers, seconds, row.status, row.jobs])
    return [*header, "seconds", "status", "jobs"], rows


def every_run(records: Sequence[Record]) -> tuple[list[str], list[list[Any]]]:
    """Header and rows of `runs.csv`: every run by its number."""
    keys = list(dict.fromkeys(key for record in records for key in record.swept))
    value, tests = value_header(records), test_metrics(records)
    header = ["job", *keys, "status", *value, *(f"{name}/test" for name in tests)]
    rows = [
        [
            record.number,
            *(setting(record, key) for key in keys),
            record.status,
            *value_cells(record, value, record.value),
            *(record.metrics.get("test", {}).get(name) for name in tests),
            record.seconds,
            first_line(record.error),
            record.name,
        ]
        for record in sorted(records, key=lambda record: record.number)
    ]
    return [*header, "seconds", "error", "folder"], rows


def first_line(error: str | None) -> str:
    """The first line of an error that may have many, or none."""
    return next(iter((error or "").strip().splitlines()), "")


def write_leaderboard(records: Sequence[Record], folder: Path) -> None:
    """`leaderboard.csv`, `leaderboard.md` and `runs.csv`, each whole or as it was."""
    write_csv(folder / "leaderboard.csv", *leaderboard(records))
    write_csv(folder / "runs.csv", *every_run(records))
    replace_file(folder / "leaderboard.md", leaderboard_markdown(records, folder.name).encode())


def write_csv(path: Path, header: list[str], rows: list[list[Any]]) -> None:
    """A table as a file; what there is not is empty."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    replace_file(path, text.getvalue().encode())


def leaderboard_markdown(records: Sequence[Record], name: str) -> str:
    """The leaderboard as Markdown: what ranks it, the table, and what failed."""
    names = ", ".join(dict.fromkeys(record.experiment for record in records))
    jobs = f"{len(records)} job{'s' * (len(records) != 1)}"
    lines = [f"Sweep {name} of {names or 'nothing'}: {jobs}, {ranking(records)}.", ""]
    lines += [markdown_table(*readable(records, test_metrics(records))), ""]
    failures = [f"- `{record.name}`: {first_line(record.error)}" for record in failed(records)]
    return "\n".join([*lines, *(["Failed:", "", *failures, ""] if failures else [])])


def ranking(records: Sequence[Record]) -> str:
    """What the rows are ordered by."""
    aims = dict.fromkeys(aim(record) for record in records if record.objective is not None)
    texts = [f"{'lowest' if way == 'minimize' else 'highest'} {name}" for name, way in aims]
    if not texts:
        return "in the order of the jobs: no objective was set"
    folded = any(len(row.records) > 1 for row in fold(records))
    spread = " (mean ± sample standard deviation over the seeds)" * folded
    return f"the {' and the '.join(texts)} first{spread}"


def failed(records: Iterable[Record]) -> list[Record]:
    """The runs that failed."""
    return [record for record in records if record.status == "failed"]


def leaderboard_text(records: Sequence[Record], limit: int = 20) -> str:
    """The leaderboard for the screen: at most `limit` rows, and what failed."""
    header, rows = readable(records, main_tests(records))
    blocks = [text_table(header, rows[:limit], left=len(swept_keys(records)))]
    if len(rows) > limit:
        blocks[0] += f"\n… and {len(rows) - limit:,} more in leaderboard.csv"
    failures = [f"  {record.name}: {first_line(record.error)}" for record in failed(records)]
    if len(failures) > FAILURES:
        failures[FAILURES:] = [f"  … and {len(failures) - FAILURES:,} more in runs.csv"]
    return "\n\n".join([*blocks, *(["\n".join(["failed:", *failures])] if failures else [])])


def main_tests(records: Sequence[Record]) -> list[str]:
    """The metrics that the screen has room for: the objectives' own, on the test set; without any, the first."""
    there = test_metrics(records)
    wanted = [name.rpartition("/")[0] for name in objectives(records)]
    return [name for name in wanted if name in there] or there[:1]


def readable(records: Sequence[Record], tests: list[str]) -> tuple[list[str], list[list[Any]]]:
    """Header and rows for people: mean ± deviation in one cell, columns that say nothing left out."""
    rows, keys, value = fold(records), swept_keys(records), value_header(records)
    header = [*keys, "runs", *value, *(f"{name}/test" for name in tests), "seconds", "status", "jobs"]
    cells = []
    for row in rows:
        values = value_cells(row.records[0], value, spread(row.values))
        scores = [spread(row.test(name)) for name in tests]
        seconds = mean(row.seconds())
        times = None if seconds is None else f"{seconds:.1f}"
        settings = [short(text) for text in row.settings.values()]
        cells.append([*settings, row.runs, *values, *scores, times, row.status, row.jobs])
    folded = any(len(row.records) > 1 for row in rows)
    silent = {name for name, *column in zip(header, *cells, strict=True) if not any(column)}
    silent |= set() if folded else {"runs"}
    kept = [place for place, name in enumerate(header) if name not in silent or name in keys]
    return [header[place] for place in kept], [[row[place] for place in kept] for row in cells]


def spread(values: Sequence[float]) -> str | None:
    """`0.8933 ± 0.0030`, or the one value."""
    std = deviation(values)
    return (
        None
        if not values
        else format_cell(mean(values)) + (f" ± {format_cell(std)}" if std is not None else "")
    )


def short(text: str | None) -> str | None:
    """A swept value as a table shows it: a long number with four digits, a long text with its end cut."""
    if text is None or len(text) <= 8:
        return text
    try:
        return f"{float(text):.4g}"
    except ValueError:
        return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
