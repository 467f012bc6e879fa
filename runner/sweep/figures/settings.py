"""Figures of the objective against the settings that a sweep varies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

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
    Span,
    add_title,
    objective_of,
    scale_of,
    shown,
    span,
    text_of,
    varied_keys,
)
from runner.sweep.leaderboard import Row, deviation, mean
from runner.sweep.record import short_keys

SMOOTH = np.linspace(0, 1, 25)  # along a line from one axis to the next


@figures.style()
def parallel_coordinates(rows: Sequence[Row]) -> Figure:
    """A vertical axis per swept key and one for the objective; a line per setting, darker where it is better."""
    keys, short = varied_keys(rows), short_keys(list(rows[0].settings))
    scales = [scale_of(rows, key) for key in keys]
    figure, grid = figures.new(size=(max(6.4, 1.6 * (len(keys) + 1)), 4.4), layout=None)
    axes = grid[0, 0]
    axes.set_axis_off()
    axes.set(xlim=(-0.55, len(keys) + 0.45), ylim=(-0.08 if all(row.values for row in rows) else -0.2, 1.17))
    whole = span(rows)
    draw_lines(axes, rows, keys, scales, whole)
    for x, (key, found) in enumerate(zip(keys, scales, strict=True)):
        draw_axis(axes, x, short[key], found.ticks, "right")
    draw_axis(axes, len(keys), whole.name, [(whole.place(v), label) for v, label in whole.ticks()], "left")
    lines = add_title(figure, rows, "darker is better")
    figure.subplots_adjust(0.02, 0.02, 0.98, 1 - (0.1 + 0.18 * lines) / figure.get_figheight())
    return figure


def draw_lines(
    axes: Axes, rows: Sequence[Row], keys: Sequence[str], scales: Sequence[Scale], whole: Span
) -> None:
    """The lines, the best last; a setting without a value is dotted and ends below the objective's axis."""
    crowded = len(rows) > CROWD
    lines, dotted, colours, widths = [], [], [], []
    for rank, row in reversed(list(enumerate(rows))):
        value = mean(row.values)
        lift = 0.5 - rank / max(len(rows) - 1, 1)  # apart where they would all pass one point
        ends = [f.places[text_of(row, k)] + lift * bundle(f) for k, f in zip(keys, scales, strict=True)]
        if value is None:
            dotted.append(smooth_line([*ends, -0.1]))
            continue
        lines.append(smooth_line([*ends, whole.place(value)]))
        colour = to_rgb(VERMILION) if rank == 0 else RAMP(whole.goodness(value))[:3]
        colours.append((*colour, 0.3 if crowded and rank >= FEW else 0.9))
        widths.append(2.6 if rank == 0 else 0.8 if crowded else 1.4)
    faint = 0.06 if crowded else 0.7
    axes.add_collection(LineCollection(dotted, colors=GREY, linewidths=0.8, linestyles=":", alpha=faint))
    axes.add_collection(LineCollection(lines, colors=colours, linewidths=widths))
    if dotted:
        axes.plot([len(keys)], [-0.1], "x", color=GREY, markersize=6)
        axes.text(
            len(keys), -0.13, f"no value: {len(dotted):,}", ha="center", va="top", fontsize=8, color=GREY
        )


def smooth_line(ends: Sequence[float]) -> np.ndarray:
    """A curve (N, 2) that is level where it passes x = 0, 1, 2 … at the heights `ends`."""
    rise = (3 - 2 * SMOOTH) * SMOOTH**2
    y = np.concatenate([a + (b - a) * rise for a, b in itertools.pairwise(ends)])
    x = np.concatenate([SMOOTH + index for index in range(len(ends) - 1)])
    return np.column_stack([x, y])


def bundle(found: Scale) -> float:
    """How far apart the lines through one tick may be."""
    return min(0.5 * found.gap, 0.07) if found.few else 0.0


def draw_axis(axes: Axes, x: int, name: str, ticks: Sequence[tuple[float, str]], side: str) -> None:
    """A vertical line with its name above it and the ticks' labels on the side where there is room."""
    axes.plot([x, x], [0, 1], color=INK, linewidth=1.0, zorder=3)
    axes.text(x, 1.09, name if len(name) <= 22 else f"…{name[-21:]}", ha="center", va="bottom", fontsize=9)
    across, offset = ("right", -5) if side == "right" else ("left", 7)
    for y, label in ticks:
        axes.plot([x], [y], "_", color=INK, markersize=6, zorder=3)
        axes.annotate(
            label,
            (x, y),
            (offset, 0),
            textcoords="offset points",
            ha=across,
            va="center",
            fontsize=8,
            bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
            zorder=4,
        )


@figures.style()
def heat_map(rows: Sequence[Row]) -> Figure | None:
    """Two keys against each other, the objective as colour and number; of three keys, a panel per value of one.

    None where there are fewer keys or more, too many values, or too few of their combinations.
    """
    keys = varied_keys(rows)
    orders = {key: list(scale_of(rows, key).places) for key in keys}
    keys.sort(key=lambda key: len(orders[key]))
    cells = math.prod(len(order) for order in orders.values())
    if len(keys) not in (2, 3) or len(orders[keys[-1]]) > 24 or len(rows) < 0.5 * cells:
        return None
    panels = orders[keys[0]] if len(keys) == 3 else [""]
    if len(panels) > 9:
        return None
    short = short_keys(list(rows[0].settings))
    down, across = keys[-2:]
    figure, grid = panel_grid(len(panels), len(orders[down]), len(orders[across]))
    for axes, text in zip(grid.flat, panels, strict=False):
        here = [row for row in rows if not text or text_of(row, keys[0]) == text]
        image = draw_cells(axes, here, rows, (down, across), orders)
        axes.set_title(f"{short[keys[0]]}={shown(text)}" if text else "")
        axes.set(xlabel=short[across], ylabel=short[down])
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes in grid.flat:
        axes.label_outer()
    whole = span(rows)
    extend = "neither" if whole.pale == whole.worst else "max" if whole.minimised else "min"
    bar = figure.colorbar(image, ax=grid, label=whole.name, aspect=30, extend=extend)
    bar.outline.set_visible(False)
    add_title(figure, rows, "darker is better")
    return figure


def panel_grid(panels: int, rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    """A figure with room for so many panels of so many cells."""
    across = panels if panels <= 3 else math.ceil(math.sqrt(panels))
    down = math.ceil(panels / across)
    width, height = max(0.72 * columns, 1.8), max(0.5 * rows, 1.2)
    return figures.new(down, across, (max(across * width + 2.4, 5.2), down * (height + 0.5) + 1.0))


def draw_cells(
    axes: Axes,
    here: Sequence[Row],
    rows: Sequence[Row],
    keys: tuple[str, str],
    orders: dict[str, list[str]],
) -> AxesImage:
    """One panel: the settings `here` among all `rows`, a cell each; hatched where no run has a value."""
    down, across = (orders[key] for key in keys)
    matrix = torch.full((len(down), len(across)), math.nan, dtype=torch.float64)
    masked = torch.zeros(matrix.shape, dtype=torch.bool)
    spots = {}
    for row in reversed(here):  # the best of several comes last and stays
        spot = down.index(text_of(row, keys[0])), across.index(text_of(row, keys[1]))
        value = mean(row.values)
        matrix[spot], masked[spot] = math.nan if value is None else value, value is None
        spots[spot] = row
    whole = span(rows)
    row_labels, column_labels = ([shown(text) for text in order] for order in (down, across))
    ends = min(whole.pale, whole.best), max(whole.pale, whole.best)
    image = figures.heat_map(axes, matrix, row_labels, column_labels, ends, masked=masked)
    image.set_cmap("Blues_r" if whole.minimised else "Blues")
    for spot, row in spots.items():
        write_cell(axes, spot, row, image)
        if row is rows[0]:
            y, x = spot
            axes.add_patch(
                Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor=VERMILION, linewidth=2.5)
            )
    if max(map(len, column_labels)) > 10:
        lean_labels(axes)
    return image


def lean_labels(axes: Axes) -> None:
    """Long labels below an axis, so that they do not touch."""
    for label in axes.get_xticklabels():
        label.set(rotation=30, ha="right", rotation_mode="anchor")


def write_cell(axes: Axes, spot: tuple[int, int], row: Row, image: AxesImage) -> None:
    """A cell's number and, below it, the deviation over seeds; in ink or white, whichever is read better."""
    y, x = spot
    value, std = mean(row.values), deviation(row.values)
    if value is None:
        words = "\n".join(dict.fromkeys(record.status for record in row.records))
        box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none"}
        axes.text(x, y, words, ha="center", va="center", fontsize=7, color=INK, bbox=box)
        return
    red, green, blue, _ = image.to_rgba(np.array(value))
    colour = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.55 else INK
    below = [f"± {format_cell(std)}"] * (std is not None) + [row.runs] * (row.runs != str(len(row.records)))
    above = 0.12 * len(below)
    axes.text(x, y - above, format_cell(value), ha="center", va="center", fontsize=8, color=colour)
    if below:
        text = "\n".join(below)
        axes.text(x, y - above + 0.17, text, ha="center", va="top", fontsize=6.5, color=colour)


@figures.style()
def values(rows: Sequence[Row]) -> Figure:
    """A panel per swept key: the objective of every setting over the key's value, with its deviation over seeds."""
    keys, short = varied_keys(rows), short_keys(list(rows[0].settings))
    down = math.ceil(len(keys) / 4)
    across = math.ceil(len(keys) / down)
    figure, grid = figures.new(down, across, (max(5.2, 2.7 * across + 0.8), 2.8 * down + 0.5), sharey=True)
    for axes, key in zip(grid.flat, keys, strict=False):
        draw_values(axes, rows, scale_of(rows, key), key)
        axes.set_xlabel(short[key])
    for axes in grid.flat[len(keys) :]:
        axes.set_axis_off()
    for axes in grid[:, 0]:
        axes.set_ylabel(objective_of(rows))
    add_title(figure, rows, "darker is better")
    return figure


def draw_values(axes: Axes, rows: Sequence[Row], found: Scale, key: str) -> None:
    """One panel of `values`."""
    whole = span(rows)
    there = [(row, value) for row in reversed(rows) if (value := mean(row.values)) is not None]
    x = [found.places[text_of(row, key)] for row, _ in there]
    y = [whole.shown(value) for _, value in there]
    error = [deviation(row.values) or 0.0 for row, _ in there]
    colours = [RAMP(whole.goodness(value)) for _, value in there[:-1]] + [to_rgb(VERMILION)]
    room = 0.06 * (whole.high - whole.low) or 0.5
    if any(error) and len(there) <= 60:
        axes.errorbar(x, y, error, fmt="none", ecolor=GREY, elinewidth=1.0, capsize=2, zorder=1)
        room = max(room, min(1.1 * max(error), 0.4 * (whole.high - whole.low)))
    axes.scatter(x, y, c=colours, s=12 if len(there) > CROWD else 22, zorder=2)
    side = min(found.gap / 2, 0.3) if found.few else 0.05
    axes.set(xlim=(-side, 1 + side), ylim=(whole.low - room, whole.high + room))
    axes.set_xticks(*zip(*found.ticks, strict=True))
    axes.set_yticks(*zip(*whole.ticks(), strict=True))
    if sum(len(label) for _, label in found.ticks) > 26:
        lean_labels(axes)
