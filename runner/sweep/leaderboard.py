"""A sweep's results: its runs ranked by their objective, those that differ in the seed alone folded into one row.

`leaderboard.csv` has every digit, `leaderboard.md` and the screen what a person reads, `runs.csv` every run.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from runner.config.command import show
from runner.config.options import leaves, with_later_keys
from runner.errors import first_line
from runner.files import csv_bytes, replace_file
from runner.records.console import format_cell, markdown_table, metric_order, text_table
from runner.sweep.record import Record, short_value

_SEED = "seed"
_FAILURES_SHOWN = 10  # on the screen


@dataclass
class Row:
    """One setting: the runs that differ in their seed alone."""

    settings: dict[str, str | None]  # value by swept key, without the seed
    records: list[Record]

    @property
    def done(self) -> list[Record]:
        """Runs that count."""
        return [record for record in self.records if record.status == "done"]

    @property
    def values(self) -> list[float]:
        """Objective of each run that is done and has one."""
        return [record.value for record in self.done if record.value is not None]

    @property
    def mean(self) -> float | None:
        """Mean of `values`, None without any."""
        return _mean(self.values)

    @property
    def std(self) -> float | None:
        """Sample standard deviation of `values` (n − 1 below), None of fewer than two."""
        return _std(self.values)

    @property
    def runs(self) -> str:
        """Number of runs that are done: `3`, or `2 of 3`."""
        done, planned = len(self.done), len(self.records)
        return str(done) if done == planned else f"{done} of {planned}"

    @property
    def status(self) -> str:
        """`done` where all are; else how many ended otherwise, and how many have no value."""
        if len(self.records) == 1:
            return self.records[0].status
        counts = Counter(record.status for record in self.records)
        del counts["done"]
        texts = [f"{count} {status}" for status, count in counts.items()]
        without_value = len(self.done) - len(self.values)
        if self.values and without_value:
            texts.append(f"{without_value} without a value")
        return ", ".join(texts) or "done"

    @property
    def jobs(self) -> str:
        return " ".join(str(record.number) for record in self.records)

    def test(self, metric: str) -> list[float]:
        """Return a metric on the test set, of each run that is done and has it."""
        values = [record.test_metrics().get(metric) for record in self.done]
        return [value for value in values if value is not None]

    def seconds(self) -> list[float]:
        """Return the duration of each run that is done."""
        return [record.seconds for record in self.done if record.seconds is not None]


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _std(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def mean_std(values: Sequence[float]) -> str | None:
    """Format `0.8933 ± 0.0030`, or the one value; None without any."""
    if not values:
        return None
    std = _std(values)
    return format_cell(_mean(values)) + (f" ± {format_cell(std)}" if std is not None else "")


def fold(records: Sequence[Record]) -> list[Row]:
    """Return one row per setting, the best first; those without a value last, each objective apart."""
    # runs that differ in their seed alone
    keys = _swept_keys(records)
    rows: dict[tuple[Any, ...], Row] = {}
    for record in records:
        settings = {key: _setting(record, key) for key in keys}
        identity = (*settings.values(), _config_without_seed(record))
        rows.setdefault(identity, Row(settings, [])).records.append(record)

    # by the mean; different objectives cannot be compared
    objectives = list(dict.fromkeys(record.ranked_by for record in records))

    def order(row: Row) -> tuple[int, bool, float]:
        objective = row.records[0].ranked_by
        mean, sign = row.mean, 1 if objective[1] == "minimize" else -1
        return (objectives.index(objective), mean is None, 0.0 if mean is None else sign * mean)

    return sorted(rows.values(), key=order)


def _swept_keys(records: Iterable[Record]) -> list[str]:
    """Return the swept keys in the order of their first job, without the seed."""
    return list(dict.fromkeys(key for record in records for key in record.swept if key != _SEED))


def _setting(record: Record, key: str) -> str | None:
    """Return a key's value as it is typed; of a job that does not sweep it, what its config says."""
    if key in record.swept:
        return record.swept[key]
    value = dict(leaves(record.config)).get(key)
    return None if value in (None, {}) else show(value)


def _config_without_seed(record: Record) -> str:
    """Return the config without its seed and what was derived from it (`data.split_seed: ${seed}`)."""
    settings, seed = (
        sorted(leaves(with_later_keys(record.config)), key=itemgetter(0)),
        record.config.get(_SEED),
    )
    derived = {key for key, value in settings if key.endswith(_SEED) and value == seed} - {*record.swept}
    return repr([(key, value) for key, value in settings if key not in {*derived, _SEED}])


def write_leaderboard(records: Sequence[Record], folder: Path) -> None:
    """Write `leaderboard.csv`, `leaderboard.md` and `runs.csv`, each whole or as it was."""
    rows = fold(records)
    replace_file(folder / "leaderboard.csv", csv_bytes(_setting_table(records, rows)))
    replace_file(folder / "runs.csv", csv_bytes(_run_table(records)))
    replace_file(folder / "leaderboard.md", _markdown(records, rows, folder.name).encode())


def _setting_table(records: Sequence[Record], rows: Sequence[Row]) -> list[list[Any]]:
    """Return `leaderboard.csv`: settings, runs, means and deviations, seconds, status, jobs."""
    value, tests = _value_header(records), _all_test_metrics(records)
    measured = [*value[-1:], *(f"{name}/test" for name in tests)]
    columns = [*value[:-1], *(text for name in measured for text in (name, f"{name} std"))]

    lines: list[list[Any]] = [[*_swept_keys(records), "runs", *columns, "seconds", "status", "jobs"]]
    for row in rows:
        samples = [*([row.values] if value else []), *(row.test(name) for name in tests)]
        numbers = [number for sample in samples for number in (_mean(sample), _std(sample))]
        objective = [row.records[0].objective] if len(value) == 2 else []
        cells = [*row.settings.values(), row.runs, *objective, *numbers]
        lines.append([*cells, _mean(row.seconds()), row.status, row.jobs])
    return lines


def _run_table(records: Sequence[Record]) -> list[list[Any]]:
    """Return `runs.csv`: every run by its number."""
    keys = list(dict.fromkeys(key for record in records for key in record.swept))
    value, tests = _value_header(records), _all_test_metrics(records)
    columns = [*value, *(f"{name}/test" for name in tests)]

    lines: list[list[Any]] = [["job", *keys, "status", *columns, "seconds", "error", "folder"]]
    for record in sorted(records, key=lambda record: record.number):
        settings = [_setting(record, key) for key in keys]
        measured = [*_value_cells(record, value, record.value), *map(record.test_metrics().get, tests)]
        cells = [record.number, *settings, record.status, *measured]
        lines.append([*cells, record.seconds, first_line(record.error), record.name])
    return lines


def _objectives(records: Iterable[Record]) -> list[str]:
    return list(dict.fromkeys(record.objective for record in records if record.objective is not None))


def _all_test_metrics(records: Iterable[Record]) -> list[str]:
    return sorted({name for record in records for name in record.test_metrics()}, key=metric_order)


def _value_header(records: Sequence[Record]) -> list[str]:
    """Return the columns of the value: named by the one objective, or two where the runs have several."""
    names = _objectives(records)
    return names if len(names) < 2 else ["objective", "value"]


def _value_cells(record: Record, header: list[str], value: Any) -> list[Any]:
    """Return a value in the columns of `_value_header`."""
    return [record.objective, value] if len(header) == 2 else [value] * len(header)


def _markdown(records: Sequence[Record], rows: Sequence[Row], name: str) -> str:
    # the order of the rows
    objectives = dict.fromkeys(record.ranked_by for record in records if record.objective is not None)
    ends = {"minimize": "lowest", "maximize": "highest"}
    best = " and ".join(f"the {ends[direction]} {objective}" for objective, direction in objectives)
    folded = len(rows) < len(records)
    explanation = " (mean ± sample standard deviation over the seeds)" * folded
    order = f"{best} first{explanation}" if best else "in the order of the jobs: no objective was set"

    names = ", ".join(dict.fromkeys(record.experiment for record in records))
    jobs = f"{len(records)} job{'s' * (len(records) != 1)}"
    lines = [f"Sweep {name} of {names or 'nothing'}: {jobs}, {order}.", ""]
    lines += [markdown_table(*_display_table(records, rows, _all_test_metrics(records))), ""]
    failures = [f"- `{job}`: {error}" for job, error in _failures(records)]
    return "\n".join([*lines, *(["Failed:", "", *failures, ""] if failures else [])])


def _failures(records: Iterable[Record]) -> list[tuple[str, str]]:
    return [(record.name, first_line(record.error)) for record in records if record.status == "failed"]


def leaderboard_text(records: Sequence[Record], limit: int = 20) -> str:
    """Return the leaderboard for the screen: at most `limit` rows, and what failed."""
    # the test metrics that fit: the objectives' own, else the first
    available = _all_test_metrics(records)
    metrics = [name.rpartition("/")[0] for name in _objectives(records)]
    tests = [name for name in metrics if name in available] or available[:1]

    header, cells = _display_table(records, fold(records), tests)
    lines = [text_table(header, cells[:limit], left=len(_swept_keys(records)))]
    if len(cells) > limit:
        lines.append(f"… and {len(cells) - limit:,} more in leaderboard.csv")
    failures = [f"  {name}: {error}" for name, error in _failures(records)]
    if len(failures) > _FAILURES_SHOWN:
        failures[_FAILURES_SHOWN:] = [f"  … and {len(failures) - _FAILURES_SHOWN:,} more in runs.csv"]
    return "\n".join([*lines, *(["", "failed:", *failures] if failures else [])])


def _display_table(
    records: Sequence[Record], rows: Sequence[Row], tests: list[str]
) -> tuple[list[str], list[list[Any]]]:
    """Return header and rows for people: mean ± deviation in one cell, without columns that say nothing."""
    keys, value = _swept_keys(records), _value_header(records)
    header = [*keys, "runs", *value, *(f"{name}/test" for name in tests), "seconds", "status", "jobs"]
    cells = []
    for row in rows:
        settings = [text and short_value(text) for text in row.settings.values()]
        values = _value_cells(row.records[0], value, mean_std(row.values))
        scores = [mean_std(row.test(name)) for name in tests]
        seconds = _mean(row.seconds())
        duration = None if seconds is None else f"{seconds:.1f}"
        cells.append([*settings, row.runs, *values, *scores, duration, row.status, row.jobs])

    # columns that are empty, and the number of runs where it is 1 everywhere
    silent = {name for name, *column in zip(header, *cells, strict=True) if not any(column)}
    silent |= {"runs"} if len(rows) == len(records) else set()
    shown = [place for place, name in enumerate(header) if name not in silent or name in keys]
    return [header[place] for place in shown], [[row[place] for place in shown] for row in cells]
