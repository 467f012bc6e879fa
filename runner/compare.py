"""Compare runs: the config keys, metrics and run facts in which they differ."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.config.command import RUN_OPTIONS, show
from runner.config.options import leaves, read_yaml, with_later_keys
from runner.engine.folders import CONFIG_FILE, enclosing_run, newest_runs
from runner.errors import UserError, first_line
from runner.files import read_json
from runner.records.console import format_cell, metric_order, shown_path, text_table
from runner.records.provenance import commits
from runner.records.tracker import FIRST_COLUMNS, read_metrics

_PATH_KEY = "root"  # last part of a key that says where data lie, which changes no result
_SPLITS = ("val", "test", "test before")
_FACTS = ("status", "error", "steps", "seconds", "samples_per_second", "device")


@dataclass(frozen=True)
class _StoredRun:
    """One run as its folder holds it. `summary` is empty where the run has not ended."""

    label: str  # its column
    folder: Path
    config: dict[str, Any]
    summary: dict[str, Any]
    metrics: dict[str, Any]  # by metric/split


def compare(paths: Sequence[Path]) -> str:
    """Return the differences between runs as tables; a path is a run's folder or lies in one.

    Raises:
        UserError: a path is not in a run, or they are not two different runs.
    """
    # the runs' folders, each once
    if len(paths) < 2:
        raise UserError("mode=compare: expected two runs or more: runs=[RUN_A,RUN_B].")
    folders = [_run_folder(path) for path in paths]
    twice = [path for path, folder in zip(paths, folders, strict=True) if folders.count(folder) > 1]
    if twice:
        raise UserError(f"runs: expected different runs, got {twice[0]} twice.")

    # A, B, C …: folders' names are too long for the head of a column
    labels = [*string.ascii_uppercase, *map(str, range(27, len(folders) + 1))]
    runs = [_read_run(label, folder) for label, folder in zip(labels, folders, strict=False)]

    # a line for each, and the tables that have rows
    lines = []
    for run in runs:
        status = run.summary.get("status") or "not ended: its metrics as far as metrics.csv has them"
        lines.append(f"{run.label}  {run.config.get('name')}, {status}: {shown_path(run.folder)}")
    blocks = ["\n".join(lines), _config_table(runs), _metric_table(runs), _fact_table(runs)]
    return "\n\n".join(block for block in blocks if block)


def _run_folder(path: Path) -> Path:
    """Return the run folder that a path is or lies in."""
    place = path.expanduser().resolve()
    run = enclosing_run(place)
    if run is not None and place.exists():
        return run
    reason = f"it holds no {CONFIG_FILE}" if place.exists() else "no such folder"
    hint = newest_runs(path.expanduser()) if run is None else f" The run: {shown_path(run)}."
    raise UserError(f"runs: {path} is not a run: {reason}.{hint}")


def _read_run(label: str, folder: Path) -> _StoredRun:
    """Read a run's config, summary and metrics."""
    stored = read_yaml(folder / CONFIG_FILE)
    summary = read_json(folder / "summary.json") or {}  # a run that has not ended has none

    # by metric/split
    if "metrics" in summary:
        metrics = summary["metrics"]
        rows = [metrics.get("val", {}), metrics.get("test", {}), metrics.get("before", {}).get("test", {})]
    else:
        rows = _rows_so_far(folder, stored)
    by_split = zip(_SPLITS, rows, strict=True)
    tags = {f"{name}/{split}": value for split, row in by_split for name, value in row.items()}
    return _StoredRun(label, folder, stored, summary, tags)


def _rows_so_far(folder: Path, stored: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the metrics of _SPLITS in a run that has not ended: val at its best objective, else the last."""
    file = folder / "metrics.csv"
    rows = read_metrics(file) if file.exists() else []
    tested, validated = ([row for row in rows if row["split"] == split] for split in ("test", "val"))
    before = tested.pop(0) if tested and tested[0]["step"] == 0 else {}

    # val at its best
    metric = str(stored.get("objective") or "").rpartition("/")[0]
    measured = [row for row in validated if not math.isnan(row.get(metric, math.nan))]
    pick = min if stored.get("direction") == "minimize" else max
    best = pick(measured, key=lambda row: row[metric]) if measured else (validated or [{}])[-1]
    last = (tested or [{}])[-1]
    return [{k: v for k, v in row.items() if k not in FIRST_COLUMNS} for row in (best, last, before)]


def _config_table(runs: Sequence[_StoredRun]) -> str:
    """Return the keys whose values differ, one column per run; without run options and places of data."""
    configs = [dict(leaves(with_later_keys(run.config))) for run in runs]
    rows = []
    for key in dict.fromkeys(key for config in configs for key in config):
        if key.partition(".")[0] in RUN_OPTIONS or key.rpartition(".")[2] == _PATH_KEY:
            continue
        column = [config.get(key, ...) for config in configs]
        if any(value != column[0] for value in column):
            rows.append([key, *("–" if value is ... else show(value) for value in column)])
    return _table("config", runs, rows) if rows else "The configs are equal."


def _metric_table(runs: Sequence[_StoredRun]) -> str:
    """Return the metrics side by side, val at its best; of two runs also the second minus the first."""
    # by split, and within it as everywhere
    tags = sorted(
        {tag for run in runs for tag in run.metrics}, key=lambda tag: metric_order(tag.partition("/")[0])
    )
    tags.sort(key=lambda tag: _SPLITS.index(tag.partition("/")[2]))

    # one row per metric
    rows = []
    for tag in tags:
        cells = [run.metrics.get(tag) for run in runs]
        rows.append([tag, *cells, *([_difference(*cells)] if len(cells) == 2 else [])])
    last = [f"{runs[1].label} − {runs[0].label}"] if len(runs) == 2 else []
    title = "metrics, val at its best step where there is an objective"
    return _table(title, runs, rows, last) if rows else ""


def _difference(first: Any, second: Any) -> str | None:
    """Format second − first with its sign; None where one is missing."""
    if first is None or second is None:
        return None
    text = format_cell(float(second) - float(first))
    return text if text.startswith(("-", "–")) else f"+{text}"


def _fact_table(runs: Sequence[_StoredRun]) -> str:
    """Return the facts that differ: time, device, code, versions; – where a run has not ended."""
    columns = [_facts(run) for run in runs]
    ended = [column for column, run in zip(columns, runs, strict=True) if run.summary]
    names = dict.fromkeys(name for column in ended for name in column)
    differing = [name for name in names if any(column.get(name) != ended[0].get(name) for column in ended)]
    rows = [[name.replace("_", " "), *(column.get(name) for column in columns)] for name in differing]
    return _table("run", runs, rows) if rows else ""


def _facts(run: _StoredRun) -> dict[str, Any]:
    """Return what a summary holds beside its metrics."""
    summary = run.summary
    facts = {name: summary.get(name) for name in _FACTS}
    facts["best epoch"] = (summary.get("best") or {}).get("epoch")
    facts["data digest"] = ((summary.get("data") or {}).get("digest") or "")[:12]
    facts |= {f"parameters {name}": count for name, count in (summary.get("parameters") or {}).items()}
    facts |= commits(summary.get("git")) | (summary.get("versions") or {})

    # as text: six digits, and an error's first line
    facts = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in facts.items()}
    return facts | {"error": first_line(facts["error"]) or None}


def _table(title: str, runs: Sequence[_StoredRun], rows: list[list[Any]], more: Sequence[str] = ()) -> str:
    return f"{title}\n{text_table(['', *(run.label for run in runs), *more], rows)}"
