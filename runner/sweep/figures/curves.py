"""Learning curves of a sweep's runs."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from runner import figures
from runner.figures import GREY, INK, PALETTE
from runner.sweep.figures.scales import BRIGHT, CROWD, described, objective_of
from runner.sweep.leaderboard import Row, spread
from runner.sweep.record import Record


@dataclass(frozen=True)
class Curve:
    """One run's objective over training, (N,) each."""

    step: np.ndarray
    epoch: np.ndarray
    value: np.ndarray


@figures.style()
def curves(rows: Sequence[Row], folder: Path) -> Figure | None:
    """The objective of every run over training: the best settings in colour, the others grey. None without any."""
    read = {record.number: read_curve(record, folder) for row in rows for record in row.records}
    found = {job: curve for job, curve in read.items() if len(curve.value)}
    if not found:
        return None
    in_epochs = any(curve.epoch[-1] > 0 for curve in found.values())
    lines = {job: np.column_stack([c.epoch if in_epochs else c.step, c.value]) for job, c in found.items()}
    figure, grid = figures.new(size=(7.2, 4.8))
    axes = grid[0, 0]
    bright = [row for row in rows if row.values and any(record.number in lines for record in row.done)]
    bright = bright[: len(PALETTE)]
    for rank, row in enumerate(bright):
        draw_bright(axes, row, lines, BRIGHT[rank], zorder=4 - rank / 10)
    seen = {record.number for row in bright for record in row.done}
    others = [line for job, line in lines.items() if job not in seen]
    draw_others(axes, others, "others" if bright else "runs")
    draw_ends(axes, rows, lines)
    name = objective_of(rows)
    minimised = rows[0].records[0].direction == "minimize"
    limits = view([lines[job] for job in seen & set(lines)], list(lines.values()), minimised)
    axes.set(xlabel="epoch" if in_epochs else "step", ylabel=name, ylim=limits)
    axes.margins(x=0.02)
    if max(line[-1, 0] for line in lines.values()) >= 2:
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))  # there is no epoch 2.5
    coloured = ", the best settings in colour" * bool(bright and others)
    title = f"{name} of {len(lines):,} run{'s' * (len(lines) != 1)}{coloured}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    handles, labels = axes.get_legend_handles_labels()
    columns = 1 if max(map(len, labels)) > 45 else 2
    figure.set_figheight(4.0 + 0.18 * math.ceil(len(labels) / columns))
    figure.legend(handles, labels, loc="outside lower left", ncols=columns)
    return figure


def read_curve(record: Record, sweep: Path) -> Curve:
    """The objective in a run's `metrics.csv`, as far as the file has it; what a kill cut short is left out."""
    metric, _, split = (record.objective or "loss/val").rpartition("/")
    points = []
    try:
        lines = (record.folder(sweep) / "metrics.csv").read_text(encoding="utf-8").splitlines(keepends=True)
        rows = csv.reader(line for line in lines if line.endswith("\n"))
        header = next(rows, [])
        if metric in header:
            places = [header.index(name) for name in ("step", "epoch", metric)]
            where = header.index("split")
            points = [
                [float(row[p]) for p in places] for row in rows if row[where] == split and row[places[-1]]
            ]
    except (OSError, ValueError, IndexError):
        points = []
    step, epoch, value = np.array(points, dtype=float).reshape(-1, 3).T
    return Curve(step, epoch, value)


def draw_bright(axes: Axes, row: Row, lines: dict[int, np.ndarray], colour: str, zorder: float) -> None:
    """One setting in its colour, with one entry in the legend: its run, or their mean and each of them fainter."""
    own = [lines[record.number] for record in row.done if record.number in lines]
    middle = mean_line(own)
    label = f"{described(row) or f'mean of {len(own)} runs'}: {spread(row.values)}"
    marker = "o" if len(middle) < 20 else None
    axes.plot(*middle.T, color=colour, marker=marker, markersize=3, label=label, zorder=zorder)
    for line in own if len(own) > 1 else []:
        axes.plot(*line.T, color=colour, linewidth=0.8, alpha=0.5, zorder=zorder)


def mean_line(lines: Sequence[np.ndarray]) -> np.ndarray:
    """The mean of curves (N, 2), where all of them have a point."""
    by_place = [dict(line) for line in lines]
    common = sorted(set.intersection(*(set(values) for values in by_place)))
    return np.array([[x, np.mean([values[x] for values in by_place])] for x in common]).reshape(-1, 2)


def draw_others(axes: Axes, lines: Sequence[np.ndarray], what: str) -> None:
    """The runs that are not among the best."""
    if lines:
        faint = 0.9 if len(lines) < 20 else 0.5 if len(lines) < CROWD else 0.2
        label = f"{len(lines):,} {what}"
        axes.add_collection(
            LineCollection(list(lines), colors=GREY, linewidths=0.8, alpha=faint, label=label, zorder=2)
        )


def draw_ends(axes: Axes, rows: Sequence[Row], lines: dict[int, np.ndarray]) -> None:
    """A cross where a run ended before its time, whatever the reason."""
    records = [record for row in rows for record in row.records if record.number in lines]
    early = [record for record in records if record.status not in ("done", "running")]
    if early:
        counts = Counter(record.status for record in early)
        label = ", ".join(f"{count} {status}" for status, count in counts.items())
        ends = np.array([lines[record.number][-1] for record in early])
        size, faint = (4, 0.9) if len(early) < 40 else (3, 0.35)
        axes.plot(*ends.T, "x", color=INK, alpha=faint, markersize=size, markeredgewidth=0.8, label=label)


def view(bright: Sequence[np.ndarray], lines: Sequence[np.ndarray], minimised: bool) -> tuple[float, float]:
    """The lowest and highest value to show: most of what the runs, and all of what the best of them came to.

    Their first third is left out: the untrained network's value would press all others into a line.
    """
    begun = 0.35 * max(line[-1, 0] for line in lines)
    usual = finite(line[line[:, 0] >= begun] for line in lines)
    if not len(usual):
        return 0.0, 1.0
    low, high = np.quantile(usual, [0.0, 0.9] if minimised else [0.1, 1.0])
    late = finite(line[line[:, 0] >= begun] for line in bright)
    low, high = min([low, *late]), max([high, *late])
    room = 0.05 * (high - low) or 0.5
    return float(low - room), float(high + room)


def finite(lines: Iterable[np.ndarray]) -> np.ndarray:
    """The finite values of curves (N, 2)."""
    values = np.concatenate([np.empty(0), *(line[:, 1] for line in lines)])
    return values[np.isfinite(values)]
