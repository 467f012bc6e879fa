"""What takes long is announced once with the right time, and can be stopped."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from experiments.ddpm_cifar import progress
from experiments.ddpm_cifar.progress import Timing
from runner.device import select
from runner.task import Interrupted, Run


class Network(nn.Module):
    """Takes 2 s for each image, and is the clock."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.batches = 0.0, list[int]()

    def perf_counter(self) -> float:
        return self.now

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.now += 2 * len(x)
        self.batches.append(len(x))
        return x


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    network = Network()
    monkeypatch.setattr(progress, "time", network)
    return network


@pytest.fixture
def made(network: Network) -> Timing:
    return Timing(Run("test", 0, select("cpu", "float32", 1, False), None, {}), network, (3, 2, 2))


def advance(made: Timing, network: Network, label: str, *parts: tuple[int, float]) -> None:
    """Advance a bar of 1000 by parts, each a number and its seconds."""
    with made.bar(label, 1000) as count:
        for number, seconds in parts:
            network.now += seconds
            count(number)


def test_the_second_part_tells_how_long_all_will_take(
    made: Timing, network: Network, said: list[str]
) -> None:
    advance(made, network, "short", (10, 50.0), (10, 0.09), (980, 50.0))
    assert said == []
    advance(made, network, "counting", (10, 50.0), (10, 3.0))  # the first part chose kernels
    assert said == ["counting: about 5 minutes"]
    advance(made, network, "counting", (10, 50.0), (10, 3.0), (10, 9.0))
    assert len(said) == 1  # not again, and not by later parts
    advance(made, network, "other", (10, 3.0), (10, 3.0))
    assert said[1:] == ["other: about 5 minutes"]


def test_what_is_long_is_announced_once_and_calls_before_the_first(made: Timing, said: list[str]) -> None:
    for text in ("a", "b", "a"):
        made.log_once(text)
    for label, seconds in (("x", 9.9), ("x", 10.0), ("x", 20.0), ("y", 600), ("z", 7200)):
        made.announce(label, seconds)
    with made.network_calls("loss", 3, 8) as tick:
        assert said.pop() == "loss: about 48 s"
        tick("what a sampler gives", 1)
    assert said == ["a", "b", "x: about 10 s", "y: about 10 minutes", "z: about 2.0 hours"]


def test_a_cpus_pace_is_measured_on_a_small_part_and_once(made: Timing, network: Network) -> None:
    assert made.pace(80) == 2 * 80 and made.pace(160) == 2 * 160
    assert network.batches == [16, 16]  # the first call also chooses kernels
    with torch.autocast("cpu"):  # another precision has another pace
        made.pace(80)
    assert len(network.batches) == 4


def test_a_bar_ends_where_the_user_asks(made: Timing) -> None:
    counted = []
    with pytest.raises(Interrupted), made.bar("counting", 5) as count:
        for number in range(5):
            made._run.stop = lambda number=number: number == 2
            count(1)
            counted.append(number)
    assert counted == [0, 1]
