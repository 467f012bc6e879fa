"""Figures of the objective against the settings that a sweep varies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle

from runner import figures
from runner.figures import GREY, INK, VERMILION
from runner.records.console import format_cell
from runner.sweep.figures.scales import (
    CROWD,
    FEW,
    RAMP,
    Scale,
    ValueAxis,
    add_title,
    label_of,
    objective_name,
    scale_of,
    text_of,
    varied_keys,
)
from runner.sweep.leaderboard import Row
from runner.sweep.record import short_keys

_PARAMETER = np.linspace(0, 1, 25)  # along a line from one axis to the next


@figures.style()
def parallel_coordinates(rows: Sequence[Row]) -> Figure:
    """Draw an axis per swept key and one for the objective; a line per setting, darker where it is better."""
    keys, short = varied_keys(rows), short_keys(list(rows[0].settings))
    scales, objective = [scale_of(rows, key) for key in keys], ValueAxis.of(rows)

    figure, grid = figures.new(size=(max(6.4, 1.6 * (len(keys) + 1)), 4.4), layout=None)
    axes = grid[0, 0]
    axes.set_axis_off()
    axes.set(xlim=(-0.55, len(keys) + 0.45), ylim=(-0.08 if all(row.values for row in rows) else -0.2, 1.17))
    _draw_lines(axes, rows, keys, scales, objective)

    # the axes
    for x, (key, scale) in enumerate(zip(keys, scales, strict=True)):
        _draw_axis(axes, x, short[key], scale.ticks, "right")
    ticks = [(objective.place(value), label) for value, label in objective.ticks()]
    _draw_axis(axes, len(keys), objective.name, ticks, "left")

    lines = add_title(figure, rows, "darker is better")
    figure.subplots_adjust(0.02, 0.02, 0.98, 1 - (0.1 + 0.18 * lines) / figure.get_figheight())
    return figure


def _draw_lines(
    axes: Axes, rows: Sequence[Row], keys: Sequence[str], scales: Sequence[Scale], objective: ValueAxis
) -> None:
    """Draw the lines, the best last; a setting without a value is dotted and ends below the objective's axis."""
    crowded = len(rows) > CROWD
    lines, dotted, colours, widths = [], [], [], []
    for rank, row in reversed(list(enumerate(rows))):
        # apart where they would all pass one point
        lift = 0.5 - rank / max(len(rows) - 1, 1)
        ends = [
            scale.places[text_of(row, key)] + lift * (min(0.5 * scale.gap, 0.07) if scale.few else 0.0)
            for key, scale in zip(keys, scales, strict=True)
        ]
        if row.mean is None:
            dotted.append(_smooth_line([*ends, -0.1]))
            continue
        lines.append(_smooth_line([*ends, objective.place(row.mean)]))
        colour = to_rgb(VERMILION) if rank == 0 else RAMP(objective.goodness(row.mean))[:3]
        colours.append((*colour, 0.3 if crowded and rank >= FEW else 0.9))
        widths.append(2.6 if rank == 0 else 0.8 if crowded else 1.4)

    faint = 0.06 if crowded else 0.7
    axes.add_collection(LineCollection(dotted, colors=GREY, linewidths=0.8, linestyles=":", alpha=faint))
    axes.add_collection(LineCollection(lines, colors=colours, linewidths=widths))
    if dotted:
        x = len(keys)
        axes.plot([x], [-0.1], "x", color=GREY, markersize=6)
        axes.text(x, -0.13, f"no value: {len(dotted):,}", ha="center", va="top", fontsize=8, color=GREY)


def _smooth_line(ends: Sequence[float]) -> np.ndarray:
    """Return a curve (N, 2) that is level where it passes x = 0, 1, 2 … at the heights `ends`."""
    rise = (3 - 2 * _PARAMETER) * _PARAMETER**2
    y = np.concatenate([a + (b - a) * rise for a, b in itertools.pairwise(ends)])
    x = np.concatenate([_PARAMETER + index for index in range(len(ends) - 1)])
    return np.column_stack([x, y])


def _draw_axis(axes: Axes, x: int, name: str, ticks: Sequence[tuple[float, str]], side: str) -> None:
    """Draw a vertical line with its name above it and the ticks' labels on one side."""
    axes.plot([x, x], [0, 1], color=INK, linewidth=1.0, zorder=3)
    axes.text(x, 1.09, name if len(name) <= 22 else f"…{name[-21:]}", ha="center", va="bottom", fontsize=9)

    align, offset = ("right", -5) if side == "right" else ("left", 7)
    box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
    style: dict[str, Any] = {"ha": align, "va": "center", "fontsize": 8, "bbox": box, "zorder": 4}
    for y, label in ticks:
        axes.plot([x], [y], "_", color=INK, markersize=6, zorder=3)
        axes.annotate(label, (x, y), (offset, 0), textcoords="offset points", **style)


@figures.style()
def heat_map(rows: Sequence[Row]) -> Figure | None:
    """Draw two keys against each other, the objective as colour and number; of three keys, a panel per value of one.

    Returns None where there are fewer keys or more, too many values, or too few of their combinations.
    """
    # the key with the fewest values first
    keys = varied_keys(rows)
    orders = {key: list(scale_of(rows, key).places) for key in keys}
    keys.sort(key=lambda key: len(orders[key]))
    cells = math.prod(len(order) for order in orders.values())
    if len(keys) not in (2, 3) or len(orders[keys[-1]]) > 24 or len(rows) < 0.5 * cells:
        return None
    panels = orders[keys[0]] if len(keys) == 3 else [""]
    if len(panels) > 9:
        return None

    # panels
    short = short_keys(list(rows[0].settings))
    down, across = keys[-2:]
    columns = len(panels) if len(panels) <= 3 else math.ceil(math.sqrt(len(panels)))
    lines = math.ceil(len(panels) / columns)
    width, height = max(0.72 * len(orders[across]), 1.8), max(0.5 * len(orders[down]), 1.2)
    size = max(columns * width + 2.4, 5.2), lines * (height + 0.5) + 1.0
    figure, grid = figures.new(lines, columns, size)
    for axes, text in zip(grid.flat, panels, strict=False):
        selected = [row for row in rows if not text or text_of(row, keys[0]) == text]
        image = _draw_cells(axes, selected, rows, (down, across), orders)
        axes.set_title(f"{short[keys[0]]}={label_of(text)}" if text else "")
        axes.set(xlabel=short[across], ylabel=short[down])
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes in grid.flat:
        axes.label_outer()

    bar = figure.colorbar(image, ax=grid, label=objective_name(rows), aspect=30)
    bar.outline.set_visible(False)
    add_title(figure, rows, "darker is better")
    return figure


def _draw_cells(
    axes: Axes,
    selected: Sequence[Row],
    rows: Sequence[Row],
    keys: tuple[str, str],
    orders: dict[str, list[str]],
) -> AxesImage:
    """Draw one panel: a cell for each of the `selected` settings among all `rows`; hatched without a value."""
    down, across = (orders[key] for key in keys)
    matrix = torch.full((len(down), len(across)), math.nan, dtype=torch.float64)
    masked = torch.zeros(matrix.shape, dtype=torch.bool)
    spots = {}
    for row in reversed(selected):  # the best of several comes last and stays
        spot = down.index(text_of(row, keys[0])), across.index(text_of(row, keys[1]))
        matrix[spot], masked[spot] = math.nan if row.mean is None else row.mean, row.mean is None
        spots[spot] = row

    objective = ValueAxis.of(rows)
    labels = [[label_of(text) for text in order] for order in (down, across)]
    limits = objective.low, objective.high
    image = figures.heat_map(axes, matrix, labels[0], labels[1], limits, masked=masked)
    image.set_cmap("Blues_r" if objective.minimised else "Blues")

    # numbers, and a frame around the best
    for (y, x), row in spots.items():
        _write_cell(axes, x, y, row, image)
        if row is rows[0]:
            frame = Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor=VERMILION, linewidth=2.5)
            axes.add_patch(frame)
    if max(map(len, labels[1])) > 10:
        _lean_labels(axes)
    return image


def _lean_labels(axes: Axes) -> None:
    """Tilt long labels below an axis, so that they do not touch."""
    for label in axes.get_xticklabels():
        label.set(rotation=30, ha="right", rotation_mode="anchor")


def _write_cell(axes: Axes, x: int, y: float, row: Row, image: AxesImage) -> None:
    """Write a cell's number and, below it, the deviation over seeds."""
    if row.mean is None:
        statuses = "\n".join(dict.fromkeys(record.status for record in row.records))
        box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none"}
        axes.text(x, y, statuses, fontsize=7, color=INK, bbox=box, ha="center", va="center")
        return

    colour = figures.text_colour(image, row.mean)
    incomplete = row.runs != str(len(row.records))
    below = [f"± {format_cell(row.std)}"] * (row.std is not None) + [row.runs] * incomplete
    y -= 0.12 * len(below)
    axes.text(x, y, format_cell(row.mean), fontsize=8, color=colour, ha="center", va="center")
    if below:
        axes.text(x, y + 0.17, "\n".join(below), ha="center", va="top", fontsize=6.5, color=colour)


@figures.style()
def value_panels(rows: Sequence[Row]) -> Figure:
    """Draw a panel per swept key: the objective of every setting over the key's value, with its deviation."""
    keys, short = varied_keys(rows), short_keys(list(rows[0].settings))
    down = math.ceil(len(keys) / 4)
    across = math.ceil(len(keys) / down)
    figure, grid = figures.new(down, across, (max(5.2, 2.7 * across + 0.8), 2.8 * down + 0.5), sharey=True)
    for axes, key in zip(grid.flat, keys, strict=False):
        _draw_panel(axes, rows, scale_of(rows, key), key)
        axes.set_xlabel(short[key])
    for axes in grid.flat[len(keys) :]:
        axes.set_axis_off()
    for axes in grid[:, 0]:
        axes.set_ylabel(objective_name(rows))
    add_title(figure, rows, "darker is better")
    return figure


def _draw_panel(axes: Axes, rows: Sequence[Row], scale: Scale, key: str) -> None:
    """Draw one panel of `value_panels`."""
    # points, the best last
    objective = ValueAxis.of(rows)
    points = [(row, row.mean) for row in reversed(rows) if row.mean is not None]
    x = [scale.places[text_of(row, key)] for row, _ in points]
    y = [mean for _, mean in points]
    error = [row.std or 0.0 for row, _ in points]
    colours = [RAMP(objective.goodness(mean)) for mean in y[:-1]] + [to_rgb(VERMILION)]
    axes.scatter(x, y, c=colours, s=12 if len(points) > CROWD else 22, zorder=2)

    # deviations, where they can be told apart
    height = objective.high - objective.low
    room = 0.06 * height or 0.5
    if any(error) and len(points) <= 60:
        axes.errorbar(x, y, error, fmt="none", ecolor=GREY, elinewidth=1.0, capsize=2, zorder=1)
        room = max(room, min(1.1 * max(error), 0.4 * height))

    side = min(scale.gap / 2, 0.3) if scale.few else 0.05
    axes.set(xlim=(-side, 1 + side), ylim=(objective.low - room, objective.high + room))
    axes.set_xticks(*zip(*scale.ticks, strict=True))
    axes.set_yticks(*zip(*objective.ticks(), strict=True))
    if sum(len(label) for _, label in scale.ticks) > 26:
        _lean_labels(axes)
