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
from runner.sweep.leaderboard import Row, mean_std
from runner.sweep.record import short_keys, short_value

FEW = 8  # values of a key that are each written on its axis; more are a continuous range
CROWD = 200  # lines from which on they are drawn faint
BRIGHT = (VERMILION, *(colour for colour in PALETTE if colour != VERMILION))  # the best first
RAMP = LinearSegmentedColormap.from_list("ramp", ["#BFCBD6", "#7FB2D6", BLUE, "#003A5C"])  # worse to better


@dataclass(frozen=True)
class Scale:
    """Where the values of one swept key stand on an axis from 0 to 1."""

    places: dict[str, float]  # by value, in their order on the axis
    ticks: list[tuple[float, str]]  # place, label
    log: bool = False

    @property
    def few(self) -> bool:
        """Whether every value has its tick."""
        return len(self.places) <= FEW

    @property
    def gap(self) -> float:
        """Smallest distance between two ticks."""
        places = sorted(place for place, _ in self.ticks)
        return min((b - a for a, b in itertools.pairwise(places)), default=1.0)


@dataclass(frozen=True)
class ValueAxis:
    """An axis for the objective of all settings, from the lowest to the highest mean."""

    name: str
    minimised: bool
    low: float
    high: float

    @classmethod
    def of(cls, rows: Sequence[Row]) -> ValueAxis:
        """Return the axis that holds every row with a value, of which there must be one."""
        means = [row.mean for row in rows if row.mean is not None]
        return cls(objective_name(rows), is_minimised(rows), min(means), max(means))

    def place(self, value: float) -> float:
        """Return where a value stands: 0 at the lower end, 1 at the upper."""
        return _place(value, self.low, self.high)

    def goodness(self, value: float) -> float:
        """Return 1 for the best value, 0 for the worst."""
        return 1 - self.place(value) if self.minimised else self.place(value)

    def ticks(self) -> list[tuple[float, str]]:
        """Return values with their labels."""
        if self.low == self.high:
            return [(self.low, format_cell(self.low))]
        return [(value, f"{value:g}") for value in _round_values(self.low, self.high, False)]


def objective_name(rows: Sequence[Row]) -> str:
    """Return the name of the objective; without one, the loss stands for it."""
    return rows[0].records[0].objective or "loss/val"


def is_minimised(rows: Sequence[Row]) -> bool:
    return rows[0].records[0].direction == "minimize"


def varied_keys(rows: Sequence[Row]) -> list[str]:
    """Return the swept keys that have more than one value."""
    return [key for key in rows[0].settings if len({text_of(row, key) for row in rows}) > 1] if rows else []


def text_of(row: Row, key: str) -> str:
    """Return a setting's value; equal numbers have equal texts."""
    text = row.settings[key]
    value = _number(text)
    return f"{value:g}" if value is not None and len(f"{value:g}") < len(str(text)) else str(text or "–")


def label_of(text: str) -> str:
    """Return a value as short as a figure has room for."""
    return short_value(text, 16).replace("$", r"\$")  # else matplotlib reads a formula


def _number(text: str | None) -> float | None:
    """Return the finite number that a text is, else None."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def scale_of(rows: Sequence[Row], key: str) -> Scale:
    """Return the axis of a key; words stand in the order of the jobs."""
    return scale([text_of(row, key) for row in sorted(rows, key=lambda row: row.records[0].number)])


def scale(texts: Sequence[str]) -> Scale:
    """Return the axis of a key's values: numbers where they belong, logarithmic where that separates them better.

    Words, and numbers that would stand too close, one after the other: numbers first, then words as they came.
    """
    distinct = list(dict.fromkeys(texts))
    numbers = {text: value for text in distinct if (value := _number(text)) is not None}
    ordered = [*sorted(numbers, key=numbers.__getitem__), *(text for text in distinct if text not in numbers)]

    # numbers at their place
    if len(numbers) == len(ordered) > 1 and numbers[ordered[0]] < numbers[ordered[-1]]:
        log = _better_as_powers(list(numbers.values()))
        low, high = numbers[ordered[0]], numbers[ordered[-1]]
        places = {text: _place(numbers[text], low, high, log) for text in ordered}
        if len(ordered) > FEW:
            ticks = [(_place(value, low, high, log), f"{value:g}") for value in _round_values(low, high, log)]
            return Scale(places, ticks, log)
        exact = Scale(places, [(places[text], label_of(text)) for text in ordered], log)
        powers_and_zero = low == 0 and high >= 8 * min(value for value in numbers.values() if value > 0)
        if exact.gap >= 0.1 and not powers_and_zero:
            return exact

    # one after the other
    count = max(len(ordered) - 1, 1)
    even = {text: index / count for index, text in enumerate(ordered)}
    every = math.ceil(len(ordered) / 16)
    return Scale(even, [(even[text], label_of(text)) for text in ordered[::every]])


def _better_as_powers(values: Sequence[float]) -> bool:
    """Return whether the median is nearer to the middle of a logarithmic axis than of a linear one."""
    low, high = min(values), max(values)
    if low <= 0 or high < 8 * low:
        return False
    median = float(np.median(values))
    return abs(_place(median, low, high, True) - 0.5) < abs(_place(median, low, high, False) - 0.5)


def _place(value: float, low: float, high: float, log: bool = False) -> float:
    """Return where a value stands between low (0) and high (1)."""
    if log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return (value - low) / (high - low) if high != low else 0.5


def _round_values(low: float, high: float, log: bool) -> list[float]:
    """Return some round numbers between two."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        steps = (1,) if len(powers) > 4 else (1, 3) if len(powers) > 2 else (1, 2, 5)
        candidates = [step * 10.0**power for power in powers for step in steps]
    else:
        candidates = [float(value) for value in MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high)]
    return [value for value in candidates if low <= value <= high] or [low, high]


def describe(row: Row) -> str:
    """Return a setting on one line: `lr=0.1, init=identity`."""
    short = short_keys(list(row.settings))
    return ", ".join(f"{short[key]}={label_of(text_of(row, key))}" for key in row.settings)


def add_title(figure: Figure, rows: Sequence[Row], how: str) -> int:
    """Title a figure with what it shows and the best of it, in lines that fit; return their number."""
    runs = [len(row.records) for row in rows]
    seeds = f"{max(runs)} seeds" if min(runs) == max(runs) else f"up to {max(runs)} seeds"
    count = f"{len(rows):,} setting{'s' * (len(rows) != 1)}{f', mean over {seeds}' * (max(runs) > 1)}"
    first = f"{objective_name(rows)}: {count}; {how}"

    some = f" ({rows[0].runs} runs)" if rows[0].runs != str(len(rows[0].records)) else ""
    best = f"best, in orange: {mean_std(rows[0].values)}{some} at {describe(rows[0])}"

    lines = [line for text in (first, best) for line in textwrap.wrap(text, int(12 * figure.get_figwidth()))]
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=10)
    return len(lines)
