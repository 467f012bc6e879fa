"""What takes long is announced with the right time, once, and can be stopped."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from experiments.ddpm_cifar import progress as waiting
from experiments.ddpm_cifar.progress import Waiting
from runner.device import select
from runner.task import Interrupted, Run


@pytest.fixture
def made() -> Waiting:
    return Waiting(Run("test", 0, select("cpu", "float32", 1, False), None, {}))


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(waiting, "time", clock)
    return clock


def go_through(
    made: Waiting, clock: Clock, what: str, total: int, parts: Iterable[tuple[int, float]]
) -> None:
    """A bar whose parts have so many things and take so many seconds."""
    with made.bar(what, total) as count:
        for more, seconds in parts:
            clock.now += seconds
            count(more)


def test_the_second_part_tells_how_long_all_will_take(made: Waiting, clock: Clock, said: list[str]) -> None:
    go_through(made, clock, "counting", 1000, [(10, 50.0), (10, 3.0)])  # the first part chose kernels
    assert said == ["counting: about 5 minutes"]
    go_through(made, clock, "counting", 1000, [(10, 50.0), (10, 3.0), (10, 9.0)])
    assert len(said) == 1  # not again, and not by later parts
    go_through(made, clock, "other", 1000, [(10, 3.0), (10, 3.0)])
    assert said[1:] == ["other: about 5 minutes"]


def test_what_is_short_is_not_announced(made: Waiting, clock: Clock, said: list[str]) -> None:
    go_through(made, clock, "counting", 1000, [(10, 50.0), (10, 0.09), (980, 50.0)])
    made.announce("sampling", 9.9)
    assert said == []
    made.announce("sampling", 10.0)
    made.announce("sampling", 20.0)
    assert said == ["sampling: about 10 s"]


def test_a_bar_ends_where_the_user_asks(made: Waiting) -> None:
    seen = []
    with pytest.raises(Interrupted), made.bar("counting", 5) as count:
        for number in range(5):
            made.run.stop = lambda number=number: number == 2
            count(1)
            seen.append(number)
    assert seen == [0, 1]


def test_a_line_is_said_once(made: Waiting, said: list[str]) -> None:
    for text in ("a", "b", "a"):
        made.say_once(text)
    assert said == ["a", "b"]


def test_durations_read_as_people_say_them() -> None:
    assert [waiting.duration(seconds) for seconds in (12.3, 600, 7200)] == ["12 s", "10 minutes", "2.0 hours"]
