"""What two runs, or more, differ in: their configs, what they came to, and what they ran on."""

from __future__ import annotations

import json
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.config.command import RUN_OPTIONS, show
from runner.config.options import leaves, read_yaml
from runner.engine.folders import CONFIG_FILE, runs_near
from runner.errors import UserError
from runner.records.console import format_cell, metric_order, shown_path, text_table
from runner.records.tracker import FIRST_COLUMNS, read_metrics

WHERE = "root"  # ends a key that says where data lie, which changes nothing
FACTS = ("status", "error", "steps", "seconds", "samples_per_second", "device", "git")


@dataclass(frozen=True)
class Finding:
    """One run as its folder tells it. `summary` is empty where the run has not ended."""

    label: str  # its column
    folder: Path
    config: dict[str, Any]
    summary: dict[str, Any]
    metrics: dict[str, Any]  # by metric/split

    @property
    def line(self) -> str:
        """The run in the list of runs."""
        status = self.summary.get("status") or "not ended: its metrics as far as metrics.csv has them"
        return f"{self.label}  {self.config.get('name')}, {status}: {shown_path(self.folder)}"


def compare(folders: Sequence[Path]) -> str:
    """The differences between runs as tables; a path is a run's folder or lies in one.

    Raises:
        UserError: a path is not in a run, or they are not two different runs.
    """
    homes = [run_home(path) for path in folders]
    twice = next((path for path, home in zip(folders, homes, strict=True) if homes.count(home) > 1), None)
    if twice is not None:
        raise UserError(f"runs: {twice} is named twice; a run does not differ from itself.")
    if len(homes) < 2:
        raise UserError("runs: a comparison takes two runs or more: runs=[A,B].")
    runs = [read_run(label_of(number), home) for number, home in enumerate(homes)]
    blocks = ["\n".join(run.line for run in runs), config_table(runs), metric_table(runs), fact_table(runs)]
    return "\n\n".join(block for block in blocks if block)


def label_of(number: int) -> str:
    """A, B, C …: folders' names are too long to stand above numbers."""
    return string.ascii_uppercase[number] if number < 26 else str(number + 1)


def run_home(path: Path) -> Path:
    """The run's folder that a path is or lies in.

    Raises:
        UserError: there is no such path, or it is in no run.
    """
    place = path.expanduser().resolve()
    home = next((folder for folder in (place, *place.parents) if (folder / CONFIG_FILE).is_file()), None)
    if home is not None and place.exists():
        return home
    if home is not None:
        raise UserError(f"runs: {path}: there is no such file in the run {shown_path(home)}.")
    reason = f"it holds no {CONFIG_FILE}" if place.exists() else "there is no such folder"
    raise UserError(f"runs: {path} is not a run: {reason}.{runs_near(path.expanduser())[0]}")


def read_run(label: str, folder: Path) -> Finding:
    """A run's config, summary and metrics.

    Raises:
        UserError: one of its files cannot be read.
    """
    stored = read_yaml(folder / CONFIG_FILE)
    file = folder / "summary.json"
    try:
        summary = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    metrics = summary["metrics"] if "metrics" in summary else metrics_so_far(folder, stored)
    return Finding(label, folder, stored, summary, by_tag(metrics))


def metrics_so_far(folder: Path, stored: dict[str, Any]) -> dict[str, Any]:
    """What `metrics.csv` has of a run that has not ended, as its summary would have it."""
    file = folder / "metrics.csv"
    rows = read_metrics(file) if file.exists() else []
    found: dict[str, Any] = {}
    tested = [row for row in rows if row["split"] == "test"]
    if tested and tested[0]["step"] == 0:
        found["before"] = {"test": values(tested.pop(0))}
    if tested:
        found["test"] = values(tested[-1])
    looked = [row for row in rows if row["split"] == "val"]
    if looked:
        found["val"] = values(best_row(looked, stored))
    return found


def best_row(rows: list[dict[str, Any]], stored: dict[str, Any]) -> dict[str, Any]:
    """The row of `val` with the best objective, the last one where there is none."""
    metric = str(stored.get("objective") or "").rpartition("/")[0]
    measured = [
        row for row in rows if row.get(metric) == row.get(metric) and metric in row
    ]  # NaN is not itself
    if not measured:
        return rows[-1]
    pick = min if stored.get("direction") == "minimize" else max
    return pick(measured, key=lambda row: row[metric])


def values(row: dict[str, Any]) -> dict[str, Any]:
    """The metrics of a row of `metrics.csv`."""
    return {name: value for name, value in row.items() if name not in FIRST_COLUMNS}


def by_tag(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics of the splits that judge a run, by `metric/split`: val, test, and test before training."""
    splits = {
        "val": metrics.get("val"),
        "test": metrics.get("test"),
        "test before": metrics.get("before", {}).get("test"),
    }
    return {
        f"{name}/{split}": value for split, found in splits.items() for name, value in (found or {}).items()
    }


def config_table(runs: Sequence[Finding]) -> str:
    """The keys whose values differ, one column per run."""
    found = [dict(settings(run.config)) for run in runs]
    keys = list(dict.fromkeys(key for values in found for key in values))
    rows = []
    for key in keys:
        there = [values.get(key, ...) for values in found]
        if any(value != there[0] for value in there):
            rows.append([key, *("–" if value is ... else show(value) for value in there)])
    return table("config", runs, rows) if rows else "The configs are equal."


def settings(node: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What a run was set to, by dotted key, without what the call decides and where things lie."""
    for key, value in leaves(node):
        if key.partition(".")[0] not in RUN_OPTIONS and key.rpartition(".")[2] != WHERE:
            yield key, value


def metric_table(runs: Sequence[Finding]) -> str:
    """The metrics side by side, val where it is best; of two runs, how far the second is above the first."""
    splits = ["val", "test", "test before"]

    def order(tag: str) -> tuple[int, tuple[int, str]]:
        name, _, split = tag.partition("/")
        return splits.index(split), metric_order(name)

    tags = sorted({tag for run in runs for tag in run.metrics}, key=order)
    rows = []
    for tag in tags:
        there = [run.metrics.get(tag) for run in runs]
        rows.append([tag, *there, *([difference(*there)] if len(there) == 2 else [])])
    if not rows:
        return ""
    last = [f"{runs[1].label} − {runs[0].label}"] if len(runs) == 2 else []
    return table("metrics, val at its best step where there is an objective", runs, rows, last)


def difference(first: Any, second: Any) -> str | None:
    """How far the second is above the first, with its sign; None where one is missing."""
    if first is None or second is None:
        return None
    text = format_cell(float(second) - float(first))
    return text if text.startswith(("-", "–")) else f"+{text}"


def fact_table(runs: Sequence[Finding]) -> str:
    """Time, device, code and versions, those that differ; what a run that has not ended cannot say is –."""
    found = [facts(run) for run in runs if run.summary]
    if len(found) < 2:
        return ""
    columns = [facts(run) for run in runs]
    rows = []
    for name in dict.fromkeys(name for column in found for name in column):
        if any(column.get(name) != found[0].get(name) for column in found):
            rows.append([name.replace("_", " "), *(column.get(name) for column in columns)])
    return table("run", runs, rows) if rows else ""


def facts(run: Finding) -> dict[str, Any]:
    """What a summary says beside its metrics."""
    summary = run.summary
    found = {name: summary.get(name) for name in FACTS}
    best = summary.get("best") or {}
    found |= {
        "best epoch": best.get("epoch"),
        "data digest": ((summary.get("data") or {}).get("digest") or "")[:12],
    }
    found |= {f"parameters {name}": count for name, count in (summary.get("parameters") or {}).items()}
    found |= summary.get("versions") or {}
    found = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in found.items()}
    error = str(found["error"] or "").strip().splitlines()
    return found | {"error": error[0] if error else None}


def table(title: str, runs: Sequence[Finding], rows: list[list[Any]], more: Sequence[str] = ()) -> str:
    """A titled table with a column per run."""
    return f"{title}\n{text_table(['', *(run.label for run in runs), *more], rows)}"
