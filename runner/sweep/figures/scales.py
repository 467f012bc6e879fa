"""Scales, colours and labels that the figures of a sweep share."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from runner.figures import BLUE, PALETTE, VERMILION
from runner.records.console import format_cell
from runner.sweep.leaderboard import Row, mean, spread
from runner.sweep.record import short_keys

FEW = 8  # values of a key that are each written on its axis; more are a continuous range
CROWD = 200  # lines from which on they are drawn faint
BRIGHT = (VERMILION, *(colour for colour in PALETTE if colour != VERMILION))  # the best first
WORSE = 10.0  # an axis ends where a value is this much further from the median than the best is
PALER = 4.0  # and there the colours do
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
