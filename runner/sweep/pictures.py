"""A sweep's pictures: how its values lead to the objective, which values go well together, every run's curve.

A line, cell or point is one setting, the mean over its seeds. What is best is vermilion in all of them. A value that
is far worse than most (a run that diverged) stands at the end of its axis, marked ≤ or ≥, else the others would all
look alike.
"""

from __future__ import annotations

import csv
import itertools
import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from runner import figures
from runner.figures import BLUE, GREY, INK, PALETTE, VERMILION
from runner.sweep.leaderboard import Row, aim, deviation, fold, mean, spread
from runner.sweep.record import Record, short_keys
from runner.tracker import format_cell

FEW = 8  # values of a key that are each written on its axis; more are a continuous range
CROWD = 200  # lines from which on they are drawn faint
BRIGHT = (VERMILION, *(colour for colour in PALETTE if colour != VERMILION))  # the best first
WORSE = 10.0  # an axis ends where a value is this much further from the median than the best is
PALER = 4.0  # and there the colours do
SMOOTH = np.linspace(0, 1, 25)  # along a line from one axis to the next
RAMP = LinearSegmentedColormap.from_list("ramp", ["#BFCBD6", "#7FB2D6", BLUE, "#003A5C"])  # worse to better


@dataclass(frozen=True)
class Scale:
    """Where the values of one swept key stand on an axis from 0 to 1."""

    places: dict[str, float]  # by value, in their order on the axis
    ticks: list[tuple[float, str]]  # place, label
    few: bool  # every value has its tick
    log: bool = False

    @property
    def gap(self) -> float:
        """The smallest distance between two ticks."""
        places = sorted(place for place, _ in self.ticks)
        return min((b - a for a, b in itertools.pairwise(places)), default=1.0)


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draw what there is to see in `folder/figures`; the files that were written.

    Where the runs have several objectives, each gets its own pictures.
    """
    aims = list(dict.fromkeys(aim(record) for record in records))
    written = []
    for name in ("heat_map", "values"):  # of fewer keys than there are by now
        (folder / "figures" / f"{name}.png").unlink(missing_ok=True)
    for objective, direction in aims:
        same = [record for record in records if aim(record) == (objective, direction)]
        suffix = "" if len(aims) == 1 else f"_{(objective or 'none').replace('/', '-')}"
        for name, figure in pictures(same, folder).items():
            path = folder / "figures" / f"{name}{suffix}.png"
            path.parent.mkdir(exist_ok=True)
            figures.save(figure, path)
            written.append(path)
    return written


def pictures(records: Sequence[Record], folder: Path) -> dict[str, Figure]:
    """The pictures of runs that have one objective, by name."""
    rows = fold(records)
    found = {"curves": curves(rows, folder)}
    keys = varied_keys(rows)
    if keys and any(row.values for row in rows):
        found["parallel_coordinates"] = parallel_coordinates(rows)
        found["heat_map"] = heat_map(rows)
        if found["heat_map"] is None:
            found["values"] = values(rows)
    return {name: figure for name, figure in found.items() if figure is not None}


def varied_keys(rows: Sequence[Row]) -> list[str]:
    """The swept keys of which there is more than one value."""
    return [key for key in rows[0].settings if len({text_of(row, key) for row in rows}) > 1] if rows else []


def text_of(row: Row, key: str) -> str:
    """A setting's value; equal numbers have equal texts."""
    text = row.settings[key]
    value = number(text)
    return f"{value:g}" if value is not None and len(f"{value:g}") < len(str(text)) else str(text or "–")


def scale_of(rows: Sequence[Row], key: str) -> Scale:
    """The axis of a key; words stand in the order of the jobs."""
    return scale([text_of(row, key) for row in sorted(rows, key=lambda row: row.records[0].number)])


def number(text: str | None) -> float | None:
    """The finite number that a text is, else None."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def scale(texts: Sequence[str]) -> Scale:
    """The axis of a key: numbers where they belong, on a logarithmic scale where they spread better on it.

    Words, and numbers that would stand too close, one after the other: numbers first, then words as they came.
    """
    found = list(dict.fromkeys(texts))
    numbers = {text: value for text in found if (value := number(text)) is not None}
    ordered = [*sorted(numbers, key=numbers.__getitem__), *(text for text in found if text not in numbers)]
    few = len(ordered) <= FEW
    if len(numbers) == len(ordered) > 1 and numbers[ordered[0]] < numbers[ordered[-1]]:
        log = spreads_better_as_powers(list(numbers.values()))
        low, high = numbers[ordered[0]], numbers[ordered[-1]]
        places = {text: place(numbers[text], low, high, log) for text in ordered}
        if not few:
            return Scale(
                places, [(place(v, low, high, log), f"{v:g}") for v in round_values(low, high, log)], few, log
            )
        exact = Scale(places, [(places[text], shown(text)) for text in ordered], few, log)
        powers_and_zero = low == 0 and high >= 8 * min(v for v in numbers.values() if v > 0)
        if exact.gap >= 0.1 and not powers_and_zero:
            return exact
    count = max(len(ordered) - 1, 1)
    even = {text: index / count for index, text in enumerate(ordered)}
    every = math.ceil(len(ordered) / 16)
    return Scale(even, [(even[text], shown(text)) for text in ordered[::every]], few)


def shown(text: str) -> str:
    """A value as short as a picture has room for: a number with four digits, the ends of a long word."""
    value = number(text)
    if value is not None and len(text) > 6:
        return f"{value:.4g}"
    columns = sum(2 if letter >= "\u2e80" else 1 for letter in text)  # Chinese and the like are twice as wide
    if columns > 16:
        kept = 7 * len(text) // columns
        text = f"{text[:kept]}…{text[-kept:]}"
    return text.replace("$", r"\$")  # else matplotlib reads a formula


def spreads_better_as_powers(values: Sequence[float]) -> bool:
    """Whether the middle of the values is nearer to the middle of a logarithmic axis than of a linear one."""
    low, high = min(values), max(values)
    if low <= 0 or high < 8 * low:
        return False
    middle = float(np.median(values))
    return abs(place(middle, low, high, True) - 0.5) < abs(place(middle, low, high, False) - 0.5)


def place(value: float, low: float, high: float, log: bool = False) -> float:
    """Where a value stands between low (0) and high (1)."""
    if log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return (value - low) / (high - low) if high != low else 0.5


def round_values(low: float, high: float, log: bool) -> list[float]:
    """Some round numbers between two."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        steps = (1,) if len(powers) > 4 else (1, 3) if len(powers) > 2 else (1, 2, 5)
        found = [step * 10.0**power for power in powers for step in steps]
    else:
        found = [float(value) for value in MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high)]
    return [value for value in found if low <= value <= high] or [low, high]


@dataclass(frozen=True)
class Span:
    """The objective and what is shown of it, where a few values are far worse than the others."""

    name: str
    minimised: bool
    best: float
    worst: float  # where the axis ends
    pale: float  # where the colours end
    beyond: bool  # there are values beyond the axis

    @property
    def low(self) -> float:
        """The axis's lower end."""
        return min(self.best, self.worst)

    @property
    def high(self) -> float:
        """The axis's upper end."""
        return max(self.best, self.worst)

    def place(self, value: float) -> float:
        """Where a value stands on the axis: 0 at its lower end, 1 at its upper."""
        return place(self.shown(value), self.low, self.high)

    def goodness(self, value: float) -> float:
        """1 for the best, 0 for what is as bad as colours can tell."""
        return min(max(place(value, self.pale, self.best), 0.0), 1.0)

    def shown(self, value: float) -> float:
        """The value, or the end of the axis that it lies beyond."""
        return min(max(value, self.low), self.high)

    def ticks(self) -> list[tuple[float, str]]:
        """Values and their labels, the worse end marked where values lie beyond it."""
        if self.low == self.high:
            return [(self.low, format_cell(self.low))]
        ticks = [(value, f"{value:g}") for value in round_values(self.low, self.high, False)]
        if not self.beyond:
            return ticks
        room = 0.06 * (self.high - self.low)
        end = f"{'≥' if self.minimised else '≤'} {self.worst:.3g}"
        return [
            *((value, text) for value, text in ticks if abs(value - self.worst) > room),
            (self.worst, end),
        ]


def span(rows: Sequence[Row]) -> Span:
    """What to show of the objective's means."""
    minimised = rows[0].records[0].direction == "minimize"
    found = [value for row in rows if (value := mean(row.values)) is not None]
    pick, other = (min, max) if minimised else (max, min)
    best, worst, middle = pick(found), other(found), float(np.median(found))
    if best == middle:
        return Span(objective_of(rows), minimised, best, worst, worst, False)
    end, pale = (pick(worst, middle + times * (middle - best)) for times in (WORSE, PALER))
    return Span(objective_of(rows), minimised, best, end, pale, end != worst)


def objective_of(rows: Sequence[Row]) -> str:
    """The name of what is best; without an objective, the loss stands for one."""
    return rows[0].records[0].objective or "loss/val"


def described(row: Row) -> str:
    """A setting on one line: `lr=0.1, init=identity`."""
    short = short_keys(list(row.settings))
    return ", ".join(f"{short[key]}={shown(text_of(row, key))}" for key in row.settings)


def add_title(figure: Figure, rows: Sequence[Row], how: str) -> int:
    """What is shown, and the best of it, in lines that fit the figure; gives their number."""
    some = f" ({rows[0].runs} runs)" if rows[0].runs != str(len(rows[0].records)) else ""
    best = f"best, in orange: {spread(rows[0].values)}{some} at {described(rows[0])}"
    first = f"{objective_of(rows)}: {count_of(rows)}; {how}"
    wide = int(12 * figure.get_figwidth())
    lines = [line for text in (first, best) for line in textwrap.wrap(text, wide)]
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=10)
    return len(lines)


def count_of(rows: Sequence[Row]) -> str:
    """What a picture's title says of its data: `12 settings, mean over 3 seeds`."""
    runs = [len(row.records) for row in rows]
    seeds = f"{max(runs)} seeds" if min(runs) == max(runs) else f"up to {max(runs)} seeds"
    return f"{len(rows):,} setting{'s' * (len(rows) != 1)}" + (
        f", mean over {seeds}" if max(runs) > 1 else ""
    )


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
