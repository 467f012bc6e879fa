"""What takes long is announced once with the right time, and can be stopped."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from experiments.ddpm_cifar import progress
from experiments.ddpm_cifar.progress import Progress
from runner.device import select
from runner.task import Interrupted, Run


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Network(nn.Module):
    """Takes 2 s for each image."""

    def __init__(self, clock: Clock):
        super().__init__()
        self.clock, self.batches = clock, list[int]()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.clock.now += 2 * len(x)
        self.batches.append(len(x))
        return x


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.fixture
def run() -> Run:
    return Run("test", 0, select("cpu", "float32", 1, False), None, {})


@pytest.fixture
def made(run: Run, clock: Clock) -> Progress:
    return Progress(run, Network(clock), (1, 2, 2))


def advance(made: Progress, clock: Clock, label: str, parts: Iterable[tuple[int, float]]) -> None:
    """Advance a bar of 1000 by parts, each a number and its seconds."""
    with made.bar(label, 1000) as count:
        for number, seconds in parts:
            clock.now += seconds
            count(number)


def test_the_second_part_tells_how_long_all_will_take(made: Progress, clock: Clock, said: list[str]) -> None:
    advance(made, clock, "counting", [(10, 50.0), (10, 3.0)])  # the first part chose kernels
    assert said == ["counting: about 5 minutes"]
    advance(made, clock, "counting", [(10, 50.0), (10, 3.0), (10, 9.0)])
    assert len(said) == 1  # not again, and not by later parts
    advance(made, clock, "other", [(10, 3.0), (10, 3.0)])
    assert said[1:] == ["other: about 5 minutes"]


def test_what_is_short_is_not_announced_and_calls_are_before_the_first(
    made: Progress, clock: Clock, said: list[str]
) -> None:
    advance(made, clock, "counting", [(10, 50.0), (10, 0.09), (980, 50.0)])
    made.announce("sampling", 9.9)
    assert said == []
    made.announce("sampling", 10.0)
    made.announce("sampling", 20.0)
    assert said == ["sampling: about 10 s"]
    with made.network_calls("loss", 3, 8) as tick:
        assert said[1:] == ["loss: about 48 s"]
        tick("what a sampler gives", 1)


def test_a_cpus_pace_is_measured_on_a_small_part_and_once(clock: Clock, run: Run) -> None:
    network = Network(clock)
    made = Progress(run, network, (3, 2, 2))
    assert made.pace(80) == 2 * 80 and made.pace(160) == 2 * 160
    assert network.batches == [16, 16]  # the first call also chooses kernels
    with torch.autocast("cpu"):  # another precision has another pace
        made.pace(80)
    assert len(network.batches) == 4


def test_a_bar_ends_where_the_user_asks(made: Progress, run: Run) -> None:
    counted = []
    with pytest.raises(Interrupted), made.bar("counting", 5) as count:
        for number in range(5):
            run.stop = lambda number=number: number == 2
            count(1)
            counted.append(number)
    assert counted == [0, 1]


def test_a_line_is_logged_once_and_durations_read_as_people_say_them(made: Progress, said: list[str]) -> None:
    for text in ("a", "b", "a"):
        made.log_once(text)
    for seconds in (12.3, 600, 7200):
        made.announce(f"{seconds}", seconds)
    assert said == ["a", "b", "12.3: about 12 s", "600: about 10 minutes", "7200: about 2.0 hours"]
