"""Learning curves of a sweep's runs."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from runner import figures
from runner.figures import GREY, INK, PALETTE
from runner.records.tracker import read_metrics
from runner.sweep.figures.scales import BRIGHT, CROWD, describe, is_minimised, objective_name
from runner.sweep.leaderboard import Row, mean_std
from runner.sweep.record import Record


@figures.style()
def curves(rows: Sequence[Row], folder: Path) -> Figure | None:
    """Draw the objective of every run over training: the best settings in colour, the others grey; None without any."""
    # lines (N, 2) by the number of the job, over epochs where there are any
    records = [record for row in rows for record in row.records]
    measured = {job.number: curve for job in records if len(curve := _read_curve(job, folder))}
    if not measured:
        return None
    in_epochs = any(curve[-1, 1] > 0 for curve in measured.values())
    lines = {job: curve[:, [int(in_epochs), 2]] for job, curve in measured.items()}

    # the best settings, then all others
    figure, grid = figures.new(size=(7.2, 4.8))
    axes = grid[0, 0]
    bright = [row for row in rows if row.values and any(record.number in lines for record in row.done)]
    bright = bright[: len(PALETTE)]
    for rank, row in enumerate(bright):
        _draw_bright(axes, row, lines, BRIGHT[rank], zorder=4 - rank / 10)
    coloured = {record.number for row in bright for record in row.done} & set(lines)
    others = [line for job, line in lines.items() if job not in coloured]
    _draw_others(axes, others, "others" if bright else "runs")
    _draw_ends(axes, rows, lines)

    # axes
    limits = _limits([lines[job] for job in coloured], list(lines.values()), is_minimised(rows))
    axes.set(xlabel="epoch" if in_epochs else "step", ylabel=objective_name(rows), ylim=limits)
    axes.margins(x=0.02)
    if max(line[-1, 0] for line in lines.values()) >= 2:
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))  # there is no epoch 2.5

    # title and legend
    note = ", the best settings in colour" * bool(bright and others)
    title = f"{objective_name(rows)} of {len(lines):,} run{'s' * (len(lines) != 1)}{note}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    handles, labels = axes.get_legend_handles_labels()
    columns = 1 if max(map(len, labels)) > 45 else 2
    figure.set_figheight(4.0 + 0.18 * math.ceil(len(labels) / columns))
    figure.legend(handles, labels, loc="outside lower left", ncols=columns)
    return figure


def _read_curve(record: Record, sweep: Path) -> np.ndarray:
    """Read step, epoch, objective (N, 3) from a run's `metrics.csv`, as far as it goes."""
    metric, _, split = (record.objective or "loss/val").rpartition("/")
    rows: list[dict[str, Any]] = []
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # not written yet, or damaged
        rows = read_metrics(record.folder(sweep) / "metrics.csv")
    points = [
        [row["step"], row["epoch"], row[metric]] for row in rows if row["split"] == split and metric in row
    ]
    return np.array(points, dtype=float).reshape(-1, 3)


def _draw_bright(axes: Axes, row: Row, lines: dict[int, np.ndarray], colour: str, zorder: float) -> None:
    """Draw one setting with one entry in the legend: its run, or their mean and each of them fainter."""
    own = [lines[record.number] for record in row.done if record.number in lines]
    # the mean of curves (N, 2), where all of them have a point
    by_place = [dict(line) for line in own]
    common = sorted(set.intersection(*map(set, by_place)))
    mean = np.array([[x, np.mean([values[x] for values in by_place])] for x in common]).reshape(-1, 2)

    label = f"{describe(row) or f'mean of {len(own)} runs'}: {mean_std(row.values)}"
    marker = "o" if len(mean) < 20 else None
    axes.plot(*mean.T, color=colour, marker=marker, markersize=3, label=label, zorder=zorder)
    for line in own if len(own) > 1 else []:
        axes.plot(*line.T, color=colour, linewidth=0.8, alpha=0.5, zorder=zorder)


def _draw_others(axes: Axes, lines: Sequence[np.ndarray], name: str) -> None:
    """Draw the runs that are not among the best."""
    if lines:
        faint = 0.9 if len(lines) < 20 else 0.5 if len(lines) < CROWD else 0.2
        grey = LineCollection(lines, colors=GREY, linewidths=0.8, alpha=faint, zorder=2)
        grey.set_label(f"{len(lines):,} {name}")
        axes.add_collection(grey)


def _draw_ends(axes: Axes, rows: Sequence[Row], lines: dict[int, np.ndarray]) -> None:
    """Draw a cross where a run ended early, whatever the reason."""
    records = [record for row in rows for record in row.records if record.number in lines]
    early = [record for record in records if record.status not in ("done", "running")]
    if early:
        counts = Counter(record.status for record in early)
        label = ", ".join(f"{count} {status}" for status, count in counts.items())
        ends = np.array([lines[record.number][-1] for record in early])
        size, faint = (4, 0.9) if len(early) < 40 else (3, 0.35)
        axes.plot(*ends.T, "x", color=INK, alpha=faint, markersize=size, markeredgewidth=0.8, label=label)


def _limits(
    bright: Sequence[np.ndarray], lines: Sequence[np.ndarray], minimised: bool
) -> tuple[float, float]:
    """Return the lowest and highest value to show: most of what the runs reach, and all of what the best reach.

    Their first third is left out: the untrained network's value would press all others into a line.
    """
    begun = 0.35 * max(line[-1, 0] for line in lines)
    usual = _finite(line[line[:, 0] >= begun] for line in lines)
    if not len(usual):
        return 0.0, 1.0
    low, high = np.quantile(usual, [0.0, 0.9] if minimised else [0.1, 1.0])
    late = _finite(line[line[:, 0] >= begun] for line in bright)
    low, high = min([low, *late]), max([high, *late])
    room = 0.05 * (high - low) or 0.5
    return float(low - room), float(high + room)


def _finite(lines: Iterable[np.ndarray]) -> np.ndarray:
    """Return the finite values of curves (N, 2)."""
    values: np.ndarray = np.concatenate([np.empty(0), *(line[:, 1] for line in lines)])
    finite: np.ndarray = values[np.isfinite(values)]
    return finite
