"""What the benchmarks share: options, ways that take turns in one process, ratios within a round, and the table."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)
Made = TypeVar("Made")
Row = Sequence[float]  # what was measured of one way: a number per round


def make_parser(description: str | None, rounds: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="counted rounds")
    parser.add_argument("--threads", type=int, default=2, help="threads of every way")
    return parser


def start(arguments: argparse.Namespace, machine: str = "") -> None:
    """Use as many threads as asked, and say so."""
    torch.set_num_threads(arguments.threads)
    machine = machine or f"{arguments.threads} threads"
    print(f"torch {torch.__version__}, {machine}, load {os.getloadavg()[0]:.2f} at the start")


def installed(makers: Mapping[str, Callable[[], Made]]) -> dict[str, Made]:
    """Make what can be made with the libraries that are installed."""
    made = {}
    for name, make in makers.items():
        try:
            made[name] = make()
        except ImportError as error:
            print(f"{name} is left out: {error}")
    return made


def seconds(call: Callable[[], object], calls: int = 1, wait: Callable[[], object] = lambda: None) -> float:
    """Per call, by the clock; `wait` awaits the device."""
    wait()
    begun = time.perf_counter()
    for _ in range(calls):
        call()
    wait()
    return (time.perf_counter() - begun) / calls


def wall_and_cpu(call: Callable[[], object]) -> Row:
    """Seconds by the clock, and of the CPU."""
    cpu = time.process_time()
    return seconds(call), time.process_time() - cpu


def take_turns(
    ways: Mapping[Key, Callable[[], Row]], rounds: int, uncounted: int = 1
) -> dict[Key, list[Row]]:
    """Call every way once a round; return, by way, a row for each of its numbers. Some rounds come before the first."""
    found: dict[Key, list[Row]] = {key: [] for key in ways}
    for number in range(-uncounted, rounds):
        for key, way in ways.items():
            numbers = way()
            if number >= 0:
                found[key].append(numbers)
    return {key: list(zip(*values, strict=True)) for key, values in found.items()}


def ratio(above: Row, below: Row) -> float:
    """The median of each round's own."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def show_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    for row in (header, ["---"] * len(header), *rows):
        print(f"| {' | '.join(row)} |")
